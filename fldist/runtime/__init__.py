"""The runtime: server loop, hosts, cohorts, placement, state, launch. Knows no algorithm by name."""
