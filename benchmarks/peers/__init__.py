"""Programs that do one piece of work with one system each: what the case `pipeline` compares. See protocol.py.

Each runs in a virtual environment of its own, with what NAME.txt pins; none imports shardq, but the one of that name.
"""
