"""Messages point at the line of a key."""

from tidegate.settings.locate import line_of

TEXT = """\
state_dir = "/x"  # comment

[ gateway ]  # the gateway
listen = "0.0.0.0:1"
  "quoted" = 1
nat.udp_timeout = 5
[[table.of]]
"""


def test_keys_headers_and_dotted_keys_are_found() -> None:
    assert line_of(TEXT, ("state_dir",)) == 1
    assert line_of(TEXT, ("gateway",)) == 3
    assert line_of(TEXT, ("gateway", "listen")) == 4
    assert line_of(TEXT, ("gateway", "quoted")) == 5
    assert line_of(TEXT, ("gateway", "nat", "udp_timeout")) == 6
    assert line_of(TEXT, ("gateway", "nat")) == 6
    assert line_of(TEXT, ("table", "of")) == 7


def test_what_holds_a_missing_key_is_the_next_best() -> None:
    assert line_of(TEXT, ("gateway", "missing")) == 3
    assert line_of(TEXT, ("missing",)) is None
