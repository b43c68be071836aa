"""Verifiers: computed and compared without a server."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from _modules import slmdb_verifier as verifier

PASSWORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=100, deadline=None)
@given(PASSWORDS)
def test_a_verifier_matches_its_own_password_only(password):
    """Any password matches what was made of it, and nothing else does."""
    made = verifier.make(password, iterations=16)
    assert verifier.matches(password, made, "role")
    assert not verifier.matches(password + "x", made, "role")


def test_two_verifiers_of_one_password_differ():
    """The salt is random."""
    assert verifier.make("secret") != verifier.make("secret")


def test_the_verifier_proves_a_client_of_rfc_5802():
    """StoredKey is the hash of the client key, and ServerKey signs, as the RFC computes them."""
    made = verifier.make("pencil", 4096)
    _, parameters, keys = made.split("$")
    iterations, salt = parameters.split(":")
    stored, server = (base64.b64decode(key) for key in keys.split(":"))
    salted = hashlib.pbkdf2_hmac("sha256", b"pencil", base64.b64decode(salt), int(iterations))
    client = hmac.digest(salted, b"Client Key", "sha256")
    assert hashlib.sha256(client).digest() == stored
    assert hmac.digest(salted, b"Server Key", "sha256") == server


def test_a_verifier_of_the_rfc_matches():
    """The example of RFC 7677: user `user`, password `pencil`."""
    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    salted = hashlib.pbkdf2_hmac("sha256", b"pencil", salt, 4096)
    signed = (
        b"n=user,r=rOprNGfwEbeRWgbNEkqO,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
        b"s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,"
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    )
    server = hmac.digest(salted, b"Server Key", "sha256")
    client = hmac.digest(salted, b"Client Key", "sha256")
    stored = hashlib.sha256(client).digest()
    expected = "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    assert base64.b64encode(hmac.digest(server, signed, "sha256")).decode() == expected
    text = ":".join(base64.b64encode(key).decode() for key in (stored, server))
    assert verifier.matches("pencil", f"SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==${text}", "user")


@pytest.mark.parametrize(
    ("password", "same"),
    [("I\u00adX", "IX"), ("\u00aa", "a"), ("\u2168", "IX"), ("a\u00a0b", "a b")],
)
def test_passwords_are_prepared_as_clients_do(password, same):
    """The examples of RFC 4013: what a client sends is prepared, so must be what is compared."""
    assert verifier.matches(password, verifier.make(same, 16), "role")


def test_md5_is_compared_with_the_role():
    """An MD5 verifier is one of password and role together."""
    stored = "md5" + hashlib.md5(b"secretrole").hexdigest()
    assert verifier.matches("secret", stored, "role")
    assert not verifier.matches("secret", stored, "other")


@pytest.mark.parametrize("stored", ["", "secret", "SCRAM-SHA-256$x", "SCRAM-SHA-512$1:a$b:c"])
def test_an_unknown_form_matches_nothing(stored):
    """What cannot be understood is not taken for a match."""
    assert not verifier.matches("secret", stored, "role")
