"""What the devices and processes of a run are to each other: the mesh, compiled programs, several processes, waits
and signals.

In order: chips, preemption, watchdog, programs, sharding, abort, peers, cluster.
"""
