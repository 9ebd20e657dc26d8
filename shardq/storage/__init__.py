"""Everything that touches Redis: key names, the functions library, connections, calls and their errors.

The only importer of redis and hiredis. It decides nothing about queues and starts no task of its own: where one is
needed (a pipe to a node), the task group is handed in by the runtime.
"""
