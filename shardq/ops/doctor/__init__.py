"""`shardq doctor`: is this cluster fit for queues, and are its queues well? It changes nothing, loads no functions, and
a node that is away or a command that is not allowed is a finding, not an error.

  check.py      one check: what it judges, what it must know for that, what it says where there is nothing to say
  servers.py    checks of one node            cluster.py   checks over all nodes
  queues.py     checks of one queue           facts.py     what is read of a queue, and the limits of all checks
  run.py        asks, looks twice, runs every check
"""
