"""The DNS proxy on the gateway's own address: clients ask it, and it asks the host's (or the configured) resolvers.

`server` receives queries over UDP and TCP, `proxy` forwards one query, `upstream` asks one resolver, `message` inspects
messages, `resolvers` chooses the resolvers, `events` says what is counted.
"""

from tidegate.dns.proxy import DnsProxy, in_flight_within
from tidegate.dns.resolvers import Resolver, choose_upstreams
from tidegate.dns.server import DnsServer

__all__ = ["DnsProxy", "DnsServer", "Resolver", "choose_upstreams", "in_flight_within"]
