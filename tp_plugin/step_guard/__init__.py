"""The guard of a training step: it repeats the first one without tensor parallelism, and compares replicas later."""
