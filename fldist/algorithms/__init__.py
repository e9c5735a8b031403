"""The algorithms, one file each; a config's `algorithm.name: fedavg` is the module `fldist.algorithms.fedavg`."""
