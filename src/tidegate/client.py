"""Assembles one client and runs it: profile, engine, TUN device, routes, DNS. Everything is undone at the end, also
after a failure half-way."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from typing import Any, TypeVar

import structlog

from tidegate.ciphers import check_cipher
from tidegate.dns.resolvers import Resolver
from tidegate.endpoint_search import EndpointCandidates, resolve_again
from tidegate.engine import ClientOptions, Engine, EngineClient, PeerStatus
from tidegate.engine_watch import explain_engine, watch_engine
from tidegate.errors import EngineError, HostNetworkError
from tidegate.host.client import ClientHost
from tidegate.host.names import resolve
from tidegate.host.routes import Renewal, RoutePlan, plan_routes
from tidegate.identity import Profile
from tidegate.lifecycle import Supervisor
from tidegate.log import RateLimit
from tidegate.settings import OffloadSettings
from tidegate.upkeep import Outcome, Reading, keep

T = TypeVar("T")

log = structlog.get_logger("tidegate.client")

REMINDER = 20.0
"""Seconds between reports that there has been no handshake yet."""
WHAT_TO_CHECK = (
    " (is its UDP port open? is the profile still valid? is this machine's clock right? "
    'see "When a client does not connect" in docs/operation.md)'
)
"""What the first of these reports adds."""
SILENCE = 20.0
"""Seconds after the first handshake until it is reported, once, that packets go out and none comes back; and until that
is looked at again where it is not clear yet whether the gateway is there."""
SEARCH_PAUSE = 30.0
"""Minimum seconds between two look-ups of the name of a gateway that does not answer."""
NEWS_DELAY = 5.0
"""Maximum seconds from a handshake attempt until its event is read here: the answer may come sooner. Before an attempt
the engine has had no answer for 15 s, so an older handshake is not mistaken for the answer."""
FIRST_LOOK, LAST_LOOK = 0.05, 1.0
"""Seconds between looks for a handshake, growing: it takes one round trip, or is not about to come."""


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """Progress of a client, for the person or program that runs `tidegate connect`."""

    event: str
    """*starting*; *waiting*: there has been no handshake yet, told again and again; *connected*: there was one, the
    first or the first after an outage; *lost*: an outage, that is, the gateway has not answered several handshakes in a
    row, told once (a tunnel without traffic needs none, so that is none); *silent*: handshakes are answered, but no
    packet has come back since the start, told once; *stopping*."""
    text: str
    fields: dict[str, Any] = field(default_factory=dict)


class _StopRequestedError(Exception):
    """A stop was requested during the start."""


class Client:
    """One tunnel to one gateway, from start to stop. Can be run once."""

    def __init__(
        self,
        profile: Profile,
        engine: Engine,
        host: ClientHost,
        *,
        tun_name: str,
        offloads: OffloadSettings,
        use_dns: bool = True,
        use_routes: bool = True,
        report: Callable[[ClientEvent], None] = lambda _: None,
    ) -> None:
        self._profile = profile
        self._engines = engine
        self._host = host
        self._tun_name = tun_name
        self._offloads = offloads
        self._use_dns = use_dns
        self._use_routes = use_routes
        self._report = report
        self._supervisor = Supervisor()
        self._unanswered = asyncio.Event()
        """Makes the search for the gateway look."""
        self._lost = asyncio.Event()
        """The gateway does not answer, as far as the engine has told."""
        self._routes = RoutePlan(0, (), ())
        """Those in force, as far as this kernel supports them."""
        self._routes_changed = asyncio.Event()
        self._reading = Reading()
        self._renewing = asyncio.Lock()
        self._last_renewal: Renewal = "whole"
        self._wide: frozenset[str] = frozenset()
        """What `_wide_routes` gave last."""
        self._admit_warning = RateLimit(time.monotonic, burst=1).admit

    async def run(self) -> signal.Signals | None:
        """Runs until SIGINT, SIGTERM or SIGHUP, and returns which. Raises `TidegateError`."""
        async with AsyncExitStack() as undo:
            undo.enter_context(self._supervisor.stop_on_signals(*stop_signals()))
            with suppress(_StopRequestedError):
                await self._start(undo)
            await self._supervisor.wait()
            with suppress(OSError):  # the terminal may be gone
                self._report(ClientEvent("stopping", "disconnecting"))
        return self._supervisor.stop_signal

    def request_stop(self) -> None:
        """Makes `run` return. Idempotent."""
        self._supervisor.request_stop()

    async def _start(self, undo: AsyncExitStack) -> None:
        """Raises `_StopRequestedError` at the next step if a stop is requested meanwhile."""
        profile = self._profile
        self._host.check_privileges()
        check_cipher(
            profile.cipher,
            self._engines.aes_available,
            user="this profile",
            hint="ask for a profile made by `tidegate peer add` without --cipher",
        )
        await self._remove_leftovers()  # first: those of a killed client may prevent look-ups
        self._heed_stop()
        endpoint = await self._unless_stopped(resolve(profile.endpoint, profile.address.ip))
        plan = self._plan_routes(endpoint)
        self._report(
            ClientEvent(
                "starting",
                f"connecting to {profile.endpoint} as {profile.address.ip}, interface {self._tun_name}",
                {"endpoint": f"{endpoint}:{profile.endpoint.port}", "address": str(profile.address.ip)},
            )
        )
        engine = await self._open_engine(endpoint, plan)
        undo.callback(engine.stop)
        self._heed_stop()
        resolvers = await asyncio.to_thread(self._host.resolvers)  # before the tunnel's replace them
        await asyncio.to_thread(self._host.configure_tun, self._tun_name, profile.address, profile.mtu)
        self._heed_stop()
        engine.start()
        self._routes = await undo.enter_async_context(in_thread(self._host.routes(plan, self._tun_name)))
        self._heed_stop()
        if self._use_dns:
            await self._tell_resolver(undo)
        self._heed_stop()
        undo.push_async_callback(self._supervisor.stop)
        handlers = {"handshake_unanswered": self._handshake_is_unanswered}
        self._supervisor.start(
            "engine-events", lambda: watch_engine(engine, self._supervisor, handlers=handlers)
        )
        self._supervisor.start("search", lambda: self._search(engine, endpoint, plan, resolvers))
        if self._routes.routes:
            self._supervisor.start("routes", self._keep_routes)
        self._supervisor.start("handshake", lambda: self._await_handshake(engine))

    def _plan_routes(self, endpoint: IPv4Address) -> RoutePlan:
        if not self._use_routes:
            return RoutePlan(0, (), ())
        return plan_routes(self._profile.allowed_ips, endpoint, self._profile.endpoint.port)

    async def _remove_leftovers(self) -> None:
        try:
            await asyncio.to_thread(
                self._host.remove_leftovers, self._tun_name, routes=self._use_routes, dns=self._use_dns
            )
        except HostNetworkError as cause:
            log.warning("cannot remove what an earlier client may have left behind", cause=cause.message)

    def _heed_stop(self) -> None:
        if self._supervisor.stop_requested:
            raise _StopRequestedError

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled if a stop is requested first."""
        working, stopped = asyncio.create_task(work), asyncio.create_task(self._supervisor.stopped())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise _StopRequestedError
            return working.result()
        finally:
            working.cancel()
            stopped.cancel()

    async def _open_engine(self, endpoint: IPv4Address, plan: RoutePlan) -> EngineClient:
        profile = self._profile
        assert profile.private_key is not None, "a profile that was read has one"
        options = ClientOptions(
            private_key=profile.private_key,
            tun_name=self._tun_name,
            mtu=profile.mtu,
            peer_public_key=profile.peer_public_key,
            preshared_key=profile.preshared_key,
            endpoint=(str(endpoint), profile.endpoint.port),
            allowed_ips=tuple(str(network) for network in profile.allowed_ips if network.version == 4),
            persistent_keepalive=profile.persistent_keepalive,
            listen_port=profile.listen_port,
            fwmark=plan.fwmark,
            offloads=self._offloads,
            cipher=profile.cipher,
        )
        try:
            return await asyncio.to_thread(self._engines.client, options)
        except OSError as cause:
            raise explain_engine(
                cause, self._tun_name, naming="--interface NAME", port="ListenPort in the profile"
            ) from cause
        except ValueError as cause:
            raise EngineError(f"the engine refuses the profile: {cause}") from cause

    async def _tell_resolver(self, undo: AsyncExitStack) -> None:
        """Sets the tunnel's DNS servers. Logs it where that is not possible: programs then go on asking the old
        ones."""
        profile = self._profile
        if not profile.dns:
            if profile.search:  # without a server, resolvers would be left with none
                searched = ", ".join(profile.search)
                log.warning("the profile has no DNS server: its search domains are ignored", search=searched)
            return
        managed = self._host.dns(self._tun_name, profile.dns, profile.search)
        outcome = await undo.enter_async_context(in_thread(managed))
        servers = ", ".join(map(str, profile.dns))
        if outcome == "unmanaged":
            log.warning(
                "nothing on this host manages resolv.conf: DNS is left as it is, and names go on to the former "
                "resolver; install systemd-resolved or resolvconf, or use --no-dns",
                servers=servers,
            )
        elif outcome == "refused":
            log.warning(
                "the program that manages resolv.conf failed: DNS is left as it is, and names go on to the former "
                "resolver",
                servers=servers,
            )

    async def _await_handshake(self, engine: EngineClient) -> None:
        """Reports when the tunnel is up, and polls no longer after that: an idle client runs nothing."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        reminded = 0
        pause = FIRST_LOOK
        while not any(peer.last_handshake is not None for peer in await peers_of(engine)):
            waited = loop.time() - began
            if waited >= REMINDER * (reminded + 1):
                reminded += 1
                text = f"no answer from {self._profile.endpoint} for {waited:.0f} s; still trying"
                text += WHAT_TO_CHECK if reminded == 1 else ""
                self._report(ClientEvent("waiting", text, {"seconds": round(waited)}))
            if await self._supervisor.wait_for_stop(pause):
                return
            pause = min(pause * 2, LAST_LOOK)
        seconds = loop.time() - began
        fields = {"address": str(self._profile.address.ip), "seconds": round(seconds, 3)}
        self._report(ClientEvent("connected", f"connected to {self._profile.endpoint}", fields))
        self._lost.clear()
        self._supervisor.start("outages", lambda: self._watch_for_outages(engine))
        await self._look_for_silence(engine)
        await self._supervisor.stopped()

    def _handshake_is_unanswered(self) -> None:
        self._unanswered.set()
        self._lost.set()

    async def _watch_for_outages(self, engine: EngineClient) -> None:
        """Reports when the gateway does not answer any more, and when it answers again. Polls in between only."""
        loop = asyncio.get_running_loop()
        while True:
            await self._lost.wait()
            began = loop.time()
            if await self._answered(engine, began) is None:  # otherwise that was late news
                text = f"{self._profile.endpoint} does not answer any more; still trying"
                self._report(ClientEvent("lost", text))
                peer = await self._await_answer(engine, began)
                if peer is None:
                    return
                if peer.endpoint is not None:  # the engine follows a gateway by itself
                    await self._move_routes(peer.endpoint)
                seconds = loop.time() - began
                text = f"connected to {self._profile.endpoint} again, after {seconds:.0f} s"
                fields = {"address": str(self._profile.address.ip), "seconds": round(seconds, 3)}
                self._report(ClientEvent("connected", text, fields))
            self._lost.clear()

    async def _await_answer(self, engine: EngineClient, told_at: float) -> PeerStatus | None:
        """Waits until `_answered` has something to return. Returns `None` if a stop is requested before."""
        pause = FIRST_LOOK
        while (peer := await self._answered(engine, told_at)) is None:
            if await self._supervisor.wait_for_stop(pause):
                return None
            pause = min(pause * 2, LAST_LOOK)
        return peer

    async def _answered(self, engine: EngineClient, told_at: float) -> PeerStatus | None:
        """The gateway, if there was a handshake since the attempt of which the engine told at `told_at` (of the loop's
        clock); `None` also if the engine is too busy to say."""
        within = asyncio.get_running_loop().time() - told_at + NEWS_DELAY
        for peer in await peers_of(engine):
            if peer.last_handshake is not None and peer.last_handshake < within:
                return peer
        return None

    async def _keep_routes(self) -> None:
        """Restores routes and rules that other programs remove (`renew_routes`)."""
        changed = self._routes_changed
        with self._host.watch(changed.set):
            changed.set()  # something may have changed before the watch began
            await keep(self._look_at_the_routes, changed, self._supervisor, self._reading)

    async def _look_at_the_routes(self) -> Outcome:
        wide_before, self._wide = self._wide, await self._wide_routes()
        if new := self._wide - wide_before:
            self._warn(
                "the network has routes that are too wide for a local network: the tunnel goes before them",
                routes=", ".join(sorted(new)),
            )
        was, self._last_renewal = self._last_renewal, "whole"
        try:
            self._last_renewal = now = await self._renew_routes()
        except HostNetworkError as cause:
            self._warn("the tunnel's routes cannot be restored", cause=cause.message)
            return "partly"
        if now == "down" != was:
            log.warning("the tunnel's device is down: traffic bypasses it", device=self._tun_name)
        elif now == "renewed":
            self._warn("the tunnel's routes or rules were gone; they are restored", device=self._tun_name)
        return "restored" if now == "renewed" else "whole"

    def _warn(self, event: str, **fields: object) -> None:
        suppressed = self._admit_warning(event)
        if suppressed is not None:
            log.warning(event, **fields, suppressed=suppressed)

    async def _renew_routes(self) -> Renewal:
        """Raises `HostNetworkError`."""
        async with self._renewing:
            return await to_its_end(partial(self._host.renew_routes, self._routes, self._tun_name))

    async def _wide_routes(self) -> frozenset[str]:
        try:
            wide = await self._reading("wide-routes", partial(self._host.wide_routes, self._routes))
            return frozenset(wide)
        except HostNetworkError as cause:
            log.debug("the host's routes cannot be read", cause=cause.message)
            return frozenset()

    async def _move_routes(self, endpoint: tuple[str, int]) -> None:
        """Lets the answers of a gateway through that is asked at another address from now on, where reverse path
        filtering is strict."""
        moved = self._routes.towards(IPv4Address(endpoint[0]), endpoint[1])
        if moved == self._routes:
            return
        self._routes = moved
        try:
            await self._renew_routes()
        except HostNetworkError as cause:
            log.warning("the routing rules cannot follow the gateway yet", cause=cause.message)
            self._routes_changed.set()  # they are tried again

    async def _search(
        self, engine: EngineClient, endpoint: IPv4Address, plan: RoutePlan, before: Sequence[Resolver]
    ) -> None:
        """Whenever the gateway has not answered for a while: resolves its name again, and tries its other addresses.
        `before` are the host's resolvers from before the tunnel."""
        candidates = EndpointCandidates((str(endpoint), self._profile.endpoint.port))
        told = None
        loop = asyncio.get_running_loop()
        while True:
            await self._unanswered.wait()
            event_at = loop.time()
            resolvers = await asyncio.to_thread(self._resolvers_outside, before)
            try:
                found = await resolve_again(
                    self._profile.endpoint, resolvers, plan.fwmark, self._profile.address.ip
                )
            except HostNetworkError as cause:
                if str(cause) != told:
                    told = str(cause)
                    log.warning("the gateway does not answer, and its name gives no address", cause=told)
            else:
                told = None
                await self._follow(
                    engine, candidates, found, plan, within=loop.time() - event_at + NEWS_DELAY
                )
            if await self._supervisor.wait_for_stop(SEARCH_PAUSE):
                return
            # An event announces an attempt, not its failure: the last attempt may have succeeded long ago. If it has
            # not, more events will come.
            self._unanswered.clear()

    def _resolvers_outside(self, before: Sequence[Resolver]) -> list[Resolver]:
        """The resolvers to ask outside the tunnel: the host's current ones (it may have moved to another network since
        the start), then those from before. Of the current ones the tunnel's own are left out; the earlier ones were
        reachable without it, even if the profile names the same (public) ones."""
        inside = set(map(str, self._profile.dns))
        now = [resolver for resolver in self._host.resolvers() if resolver[0] not in inside]
        return [*dict.fromkeys([*now, *before])]

    async def _follow(
        self,
        engine: EngineClient,
        candidates: EndpointCandidates,
        found: IPv4Address,
        plan: RoutePlan,
        *,
        within: float,
    ) -> None:
        """Sets the next address to try, if there is another one. Does nothing if there was a handshake in the last
        `within` seconds, or if the engine is too busy to say."""
        peer = next(iter(await peers_of(engine)), None)
        if peer is None or (peer.last_handshake is not None and peer.last_handshake < within):
            return
        if self._would_swallow(plan, found):
            log.warning(
                "the gateway has moved to an address inside AllowedIPs: reconnect", address=str(found)
            )
            return
        target = candidates.next((str(found), self._profile.endpoint.port), peer.endpoint)
        if target != peer.endpoint:
            before, now = (f"{at[0]}:{at[1]}" if at else None for at in (peer.endpoint, target))
            log.info("the gateway does not answer: trying another address", before=before, now=now)
            await self._move_routes(target)
            await asyncio.to_thread(engine.set_endpoint, target)

    def _would_swallow(self, plan: RoutePlan, endpoint: IPv4Address) -> bool:
        """Whether the routes would send the tunnel's own datagrams into the tunnel."""
        return not plan.has_policy and self._plan_routes(endpoint).has_policy

    async def _look_for_silence(self, engine: EngineClient) -> None:
        """Reports it if packets go out and none comes back: two ends with different ciphers complete handshakes, but
        exchange no data. Only another handshake shows that it is not the gateway that is gone: what is sent without an
        answer makes the engine try one."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not await self._supervisor.wait_for_stop(SILENCE):
            waited = loop.time() - began
            peer = next(iter(await peers_of(engine)), None)
            if self._lost.is_set() or peer is None or not peer.sent_packets or peer.received_packets:
                return
            if peer.last_handshake is not None and peer.last_handshake < waited:
                cipher = self._profile.cipher
                text = (
                    f"no packet came back in {waited:.0f} s; if none does, compare ciphers: {cipher} here, "
                    "on the gateway what `tidegate peer show` says"
                )
                self._report(ClientEvent("silent", text, {"cipher": cipher}))
                return


async def peers_of(engine: EngineClient) -> Sequence[PeerStatus]:
    """The engine's peers (one), asked in a thread because the answer may take seconds. Empty if the engine is too busy
    to answer: that does not end a tunnel, and an engine that has died says so in an event."""
    try:
        return (await asyncio.to_thread(engine.status)).peers
    except RuntimeError as cause:
        log.debug("the engine does not report its status", cause=str(cause))
        return ()


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a client. SIGHUP (the terminal was closed) is left out where it is ignored, as under
    nohup(1)."""
    hung_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, *hung_up)


async def to_its_end(work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread. A cancelled caller waits for the thread, so that `work` does nothing after
    the caller has undone it."""
    working = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        if not working.cancelled() and (cause := working.exception()) is not None:
            log.debug("work that was waited for at the end failed", cause=repr(cause))
        raise


@asynccontextmanager
async def in_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves `manager` in a thread: netlink may block, and its library runs an event loop of its own."""
    value = await asyncio.to_thread(manager.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)
