"""A small internet in network namespaces: to see Tidegate work, to test it end to end, to measure it.

Nothing here belongs to a running gateway. `topology` builds the namespaces, `services` runs the servers of the
internet side, `stacks` starts a gateway or a client (Tidegate's, or what it is compared with), `checks` looks at the
result, and `demo` and `bench` put these together.
"""
