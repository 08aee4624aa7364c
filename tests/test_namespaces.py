"""Private namespaces: who is told apart, and that no key can be read anywhere."""

from __future__ import annotations

import pytest

from mlx_promptcache.namespaces import COMMON, Namespaces

BOTH = Namespaces(per_key=True, per_user=True)


@pytest.mark.parametrize(
    ("namespaces", "authorization", "user"),
    [
        (Namespaces(), "Bearer key", "ann"),
        (Namespaces(per_key=True), None, "ann"),
        (Namespaces(per_key=True), "Bearer ", "ann"),
        (Namespaces(per_user=True), "Bearer key", None),
        (Namespaces(per_user=True), "Bearer key", ""),
        (Namespaces(), "Bearer key", 7),
    ],
)
def test_who_is_not_told_apart_shares_the_common_namespace(
    namespaces: Namespaces, authorization: str | None, user: object
) -> None:
    assert namespaces.of(authorization, user) == COMMON


def test_keys_users_and_salts_make_namespaces_of_their_own() -> None:
    names = [
        BOTH.of("Bearer a", None),
        BOTH.of("Bearer b", None),
        BOTH.of(None, "a"),
        BOTH.of("Bearer a", "b"),
        BOTH.of("Bearer ab", None),
        Namespaces("salt", per_key=True, per_user=True).of("Bearer a", None),
    ]
    assert len(set(names)) == len(names)
    assert COMMON not in names


def test_a_key_is_the_same_however_its_header_is_written() -> None:
    headers = ("Bearer secret", "bearer  secret ", "secret")
    assert len({BOTH.of(header, None) for header in headers}) == 1


def test_neither_key_nor_user_stands_in_the_name_of_a_namespace() -> None:
    name = BOTH.of("Bearer secret", "ann")
    assert "secret" not in name
    assert "ann" not in name
    assert name == BOTH.of("Bearer secret", "ann")


@pytest.mark.parametrize("user", [7, ["ann"], {"a": 1}])
def test_a_user_that_is_no_text_is_refused(user: object) -> None:
    with pytest.raises(ValueError, match="user must be of type str"):
        BOTH.of(None, user)
