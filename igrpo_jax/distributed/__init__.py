"""The devices and processes of a run: mesh and shardings, compiled programs, several processes, waits and signals.

In order: chips, preemption, watchdog, programs, compiling, sharding, abort, disk_cache, peers, teams, cluster.
"""
