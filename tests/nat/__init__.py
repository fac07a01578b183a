"""The NAT's core, through `tidegate.engine.Nat`. scapy, which shares no code with it, makes the packets and is the
oracle of headers and checksums; hypothesis chooses them."""
