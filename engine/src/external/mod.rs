//! The external interface: a user-space face on the host's own network card and address.
