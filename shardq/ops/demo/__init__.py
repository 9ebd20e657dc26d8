"""`shardq demo`: real flight records through a real cluster, one worker killed on the way, the outcome checked.

flights (the data) -> run (cluster, producer, the kill) -> worker (the handler, in processes of its own) -> journal
(what was handled, on disk) -> report (judged against the file). Nothing here is for use outside the demo.
"""
