"""What of the lab only tests need: forged packets, many connections, a STUN server, a debugger that halts a thread.

Those that are programs are started by their file, which is found from wherever pytest was run.
"""
