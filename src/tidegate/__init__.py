"""Tidegate: a VPN gateway that lives wholly in user space."""
