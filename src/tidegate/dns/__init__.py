"""The DNS proxy on the gateway's own address: clients ask it, it asks the host's (or the configured)
resolvers.

`server` receives queries over UDP and TCP, `proxy` carries one query through, `upstream` asks one resolver,
`message` looks into messages, `resolvers` says whom to ask.
"""

from tidegate.dns.proxy import DnsProxy
from tidegate.dns.resolvers import Resolver, choose_upstreams
from tidegate.dns.server import DnsServer

__all__ = ["DnsProxy", "DnsServer", "Resolver", "choose_upstreams"]
