"""
Replacing the password: in the file, in the server and in the running backend, or not at all.

The file is the journal. Each step below is one atomic write of the file or one transaction, and the
layout of the file together with what the server accepts tells where a killed rotation stopped:

=========  ====================  ===================  =======  ==================================
layout     KEY                   KEY_NEXT             server   the next run
=========  ====================  ===================  =======  ==================================
begun      old                   new                  old      undoes it: KEY_NEXT goes
set        old                   new                  new      goes on
switched   new (KEY_PREVIOUS:    new                  new      proves it, else undoes it
           old)
undone     new (KEY_PREVIOUS:    new                  old      finishes undoing
           old)
=========  ====================  ===================  =======  ==================================

At every moment one of the passwords in the file opens the database.
"""

from __future__ import annotations

import datetime
from typing import Any

from salt.exceptions import CommandExecutionError
from salt.loader.dunder import __opts__

__virtualname__ = "slmdb_secret_rotation"


def __virtual__() -> str:
    return __virtualname__


class _Rotation:
    """One rotation of one role; the caller holds the file's lock."""

    def __init__(self, plan: Any):
        self.plan, self.want, self.store = plan, plan.want, plan.store
        self.application = self.want["role"] == __salt__["slmdb_pillar.get"]("role")
        self.login_works = self._login(plan.password) is True
        self.touched = False
        self.report: dict[str, Any] = {"role": self.want["role"], "file": self.want["file"]}

    def complete(self) -> None:
        """Write what the file lacks: a killed rotation is found again by the key alone."""
        present = self.store.values()
        missing = {
            name: text for name, text in self.plan.edits.items() if present.get(name) != text
        }
        if missing:
            self._save(missing)

    def begin(self, new: str) -> None:
        self._save({self.plan.next_key: new})
        self._put(new)

    def switch(self, old: str, new: str) -> None:
        plan = self.plan
        changes = {plan.next_key: new, plan.previous_key: old}
        self._save({self.want["key"]: new, **changes, **self._urls(new)})

    def settle(self, old: str, new: str) -> dict[str, Any]:
        """Prove the new password with the backend; undo everything if it does not work."""
        try:
            self.touched = "skipped" not in __salt__["slmdb_secret_backend.intention"](self.want)
            self.report["backend"] = __salt__["slmdb_secret_backend.renew"](self.want)
            self._prove(new)
        except CommandExecutionError as err:
            self.undo(old)
            raise CommandExecutionError(
                f"the rotation was undone, the old password is in force: {err.strerror}"
            ) from err
        return self._finish(old)

    def undo(self, old: str) -> None:
        """Go back to the old password in the server, in the file and in the backend."""
        self._put(old)
        self._save({self.want["key"]: old, **self._urls(old), **self._without_helpers()})
        __salt__["slmdb_secret_backend.restore"](self.want, self.touched)

    def drop(self) -> dict[str, Any]:
        """Forget the next password, which was never in force."""
        self._save(self._without_helpers())
        return {**self.report, "rotated": False}

    def _prove(self, new: str) -> None:
        answer = self._login(new)
        if self.login_works and answer is not True:
            raise CommandExecutionError(f"the new password does not log in: {answer}")
        self.report["login"] = answer
        if not self.plan.in_step(new):
            raise CommandExecutionError("the server does not have the new password")

    def _finish(self, old: str) -> dict[str, Any]:
        changes = self._without_helpers()
        if self.want["rotate_every"] or self.plan.since_key in self.store.values():
            today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            changes[self.plan.since_key] = today
        self._save(changes)
        refused = self._login(old) is not True if self.report["login"] is True else None
        stale = __salt__["slmdb_secret_url.stale_urls"](self.want, self.store)
        return {**self.report, "rotated": True, "old_password_refused": refused, "url_stale": stale}

    def _login(self, password: str) -> bool | str | None:
        """Log in over TCP; None if no rule is sure to admit the role: the verifier is the proof."""
        want = self.want
        if not self.application and want["database"] == __salt__["slmdb_pillar.get"]("database"):
            return None
        return __salt__["slmdb_verifier.login"](
            want["role"], password, want["database"], "127.0.0.1", want["port"]
        )

    def _put(self, password: str) -> None:
        __salt__["slmdb_verifier.put"](self.want["role"], password)

    def _urls(self, password: str) -> dict[str, str]:
        return __salt__["slmdb_secret_url.renewed_urls"](self.want, self.store, password)

    def _without_helpers(self) -> dict[str, str | None]:
        present = self.store.values()
        helpers = (self.plan.next_key, self.plan.previous_key)
        return {name: None for name in helpers if name in present}

    def _save(self, changes: dict[str, str | None]) -> None:
        want = self.want
        self.store.save(changes, want["owner"], want["group"], want["mode"])


def rotate(plan: Any, new: str | None = None, strict: bool = True) -> dict[str, Any]:
    """
    Replace a password.

    plan
        A ``Plan`` of a file and a server that are in step, made under the file's lock.
    new
        The new password; None makes one.
    strict
        Whether a login of the application's role with the present password must work first; else,
        where it does not, the verifier alone is the proof.

    Returns role, file, backend (what was done with it), login (None if none was tried), rotated,
    old_password_refused and url_stale. Raises ``CommandExecutionError`` if the new password did not
    work: everything is as before then.

    For callers in Python.
    """
    rotation = _Rotation(plan)
    _check(rotation, strict)
    rotation.complete()
    new = new or __salt__["slmdb_secret_plan.generated"](plan.want["length"])
    rotation.begin(new)
    rotation.switch(plan.password, new)
    return rotation.settle(plan.password, new)


def preview(plan: Any) -> dict[str, Any]:
    """
    Say what ``rotate`` would do.

    plan
        A ``Plan`` of a file and a server.

    Returns role, file, keys (those that would change) and backend. Raises ``CommandExecutionError``
    if the rotation could not begin.

    For callers in Python.
    """
    rotation = _Rotation(plan)
    if plan.rotation != "interrupted":
        _check(rotation, strict=True)
    return {
        **rotation.report,
        "keys": list(dict.fromkeys([plan.want["key"], *rotation._urls(""), *plan.edits])),
        "backend": __salt__["slmdb_secret_backend.intention"](plan.want),
        "interrupted": plan.rotation == "interrupted",
        "rotated": False,
    }


def _check(rotation: _Rotation, strict: bool) -> None:
    plan = rotation.plan
    if not plan.in_step(plan.password):
        raise CommandExecutionError(
            f"{plan.store.path} and the server are not in step: apply slm_database.secret first"
        )
    plan.refuse_own_urls()
    if strict and rotation.application and not rotation.login_works:
        raise CommandExecutionError(
            "the present password does not log in over 127.0.0.1 "
            f"({rotation._login(plan.password)}), so a new one could not be proven: "
            "nothing was changed"
        )


def resume(plan: Any) -> dict[str, Any]:
    """
    Finish or undo a rotation that was interrupted.

    plan
        A ``Plan`` made under the file's lock.

    Returns what ``rotate`` returns; rotated is False if it was undone. Raises
    ``CommandExecutionError`` if the new password turns out not to work: it is undone then.

    For callers in Python.
    """
    rotation = _Rotation(plan)
    current, following = plan.password, plan.values.get(plan.next_key)
    previous = plan.values.get(plan.previous_key)
    works = plan.in_step(current)
    if previous is None:
        if works or following is None or not plan.in_step(following):
            if not works:
                __salt__["slmdb_verifier.put"](plan.want["role"], current)
            return rotation.drop()
        rotation.switch(current, following)
        rotation.login_works = False
        return rotation.settle(current, following)
    if not works and plan.in_step(previous):
        rotation.undo(previous)
        return {**rotation.report, "rotated": False}
    if not works:
        __salt__["slmdb_verifier.put"](plan.want["role"], current)
    return rotation.settle(previous, current)
