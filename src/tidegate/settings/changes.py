"""The differences between two readings of the settings, and which of them a running gateway can apply."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from tidegate.errors import SettingsError
from tidegate.settings.messages import describe_error
from tidegate.settings.model import Settings
from tidegate.settings.sources import Key

LIVE: tuple[Key, ...] = (
    ("nat",),
    ("dns", "upstreams"),
    ("dns", "profile_servers"),
    ("log",),
    ("external", "addresses"),
    ("external", "deny"),
    ("gateway", "endpoint"),
    ("gateway", "between_clients"),
)
"""Settings, or whole sections, that take effect without a restart; sockets, devices and threads are made only once."""


def is_live(key: Key) -> bool:
    return any(key[: len(live)] == live for live in LIVE)


def changed_keys(before: BaseModel, after: BaseModel, above: Key = ()) -> list[Key]:
    """The settings whose values differ, in the order in which they are declared."""
    changed: list[Key] = []
    for name in type(before).model_fields:
        old, new, key = getattr(before, name), getattr(after, name), (*above, name)
        if isinstance(old, BaseModel) and isinstance(new, BaseModel):
            changed += changed_keys(old, new, key)
        elif old != new:
            changed.append(key)
    return changed


def with_live_changes(running: Settings, wanted: Settings) -> Settings:
    """The settings in force once everything that can be applied has been. Raises `SettingsError` if no gateway could
    start with them: an upstream outside the new subnet may lie inside the one in use."""
    merged = running.model_copy(
        update={
            "nat": wanted.nat,
            "log": wanted.log,
            "dns": running.dns.model_copy(
                update={"upstreams": wanted.dns.upstreams, "profile_servers": wanted.dns.profile_servers}
            ),
            "external": running.external.model_copy(
                update={"addresses": wanted.external.addresses, "deny": wanted.external.deny}
            ),
            "gateway": running.gateway.model_copy(
                update={
                    "endpoint": wanted.gateway.endpoint,
                    "between_clients": wanted.gateway.between_clients,
                }
            ),
        }
    )
    try:
        return Settings.model_validate({name: getattr(merged, name) for name in Settings.model_fields})
    except ValidationError as invalid:
        trouble = describe_error(invalid.errors(include_url=False)[0])
        raise SettingsError(
            f"{trouble}, which is in use until a restart", hint="restart the gateway to apply both changes"
        ) from None
