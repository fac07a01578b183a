"""The settings, and the sources they are read from."""

from tidegate.settings.model import (
    DnsSettings,
    ExternalSettings,
    GatewaySettings,
    LogSettings,
    NatSettings,
    OffloadSettings,
    Settings,
)
from tidegate.settings.sources import DEFAULT_PATH, Key, SettingsSources, load_settings

__all__ = [
    "DEFAULT_PATH",
    "DnsSettings",
    "ExternalSettings",
    "GatewaySettings",
    "Key",
    "LogSettings",
    "NatSettings",
    "OffloadSettings",
    "Settings",
    "SettingsSources",
    "load_settings",
]
