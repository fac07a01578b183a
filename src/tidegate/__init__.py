"""Tidegate: a VPN gateway that lives wholly in user space."""

VERSION = "0.1.0"
