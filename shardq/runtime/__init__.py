"""Client, producer, worker, coordinator: the only place with tasks and time. Redis is reached through storage/ alone,
and what can be decided without I/O is decided in core/.
"""
