"""The lock of a folder in a bucket, against a storage service on localhost."""

import json
import threading
import time

import pytest

from igrpo_jax.errors import RunError
from igrpo_jax.storage import lease as leases
from igrpo_jax.storage.addresses import path_of


@pytest.fixture
def lock(bucket, monkeypatch):
    """The path of a lock, with short times."""
    monkeypatch.setattr(leases, "RENEWED", 0.05)
    monkeypatch.setattr(leases, "EXPIRES", 0.6)
    monkeypatch.setattr(leases, "SETTLED", 0.01)
    return path_of("--workdir X", bucket.address) / ".lock"


@pytest.fixture
def s3_lock(s3_bucket, lock):
    return path_of("--workdir X", s3_bucket.address) / ".lock"


def write(bucket, **other):
    """Writes the lock of a holder elsewhere."""
    holder = {"token": "t", "number": 1, "process": 7, "host": "elsewhere", "machine": "another"}
    bucket.write(".lock", json.dumps(holder | other))


def test_one_holder_at_a_time(lock, bucket):
    first = leases.Lease(lock)
    first.acquire()
    with pytest.raises(leases.Held, match=r"process \d+ on "):
        leases.Lease(lock).acquire()
    first.check()
    first.release()
    assert bucket.names() == []
    second = leases.Lease(lock)
    second.acquire()
    second.release()


def test_of_several_that_ask_at_once_one_gets_it(lock):
    results = []

    def ask():
        lease = leases.Lease(lock)
        try:
            lease.acquire()
            results.append(lease)
        except leases.Held:
            results.append(None)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (holder,) = filter(None, results)
    holder.release()


def test_who_comes_late_does_not_write_over_a_lock(lock, bucket, monkeypatch):
    first, late = leases.Lease(lock), leases.Lease(lock)
    first.acquire()
    monkeypatch.setattr(leases, "make_free", lambda path: None)  # it looked before the first one wrote
    with pytest.raises(leases.Held):
        late.acquire()
    assert json.loads(bucket.read(".lock"))["token"] == first._token
    first.release()


def test_the_lock_of_a_holder_that_is_gone_expires(lock, bucket):
    write(bucket)
    lease, began = leases.Lease(lock), time.monotonic()
    lease.acquire()
    assert time.monotonic() - began >= leases.EXPIRES
    lease.release()


def test_a_process_of_this_machine_that_has_ended_holds_nothing(lock, bucket, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRES", 60.0)
    write(bucket, machine=leases._machine(), process=2**22 + 1)  # above the highest number that Linux gives
    lease, began = leases.Lease(lock), time.monotonic()
    lease.acquire()
    assert time.monotonic() - began < 10
    lease.release()


def test_a_holder_that_was_replaced_ends_and_leaves_the_lock(lock, bucket):
    lease = leases.Lease(lock)
    lease.acquire()
    write(bucket)
    deadline = time.monotonic() + 10
    while not lease._is_lost and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(RunError, match=r"\.lock: another run took this folder"):
        lease.check()
    lease.release()
    assert json.loads(bucket.read(".lock"))["host"] == "elsewhere"


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("kind", ["", "s3_"])
def test_a_holder_does_not_take_back_a_lock_that_was_taken_while_it_renewed_it(kind, is_done, request, monkeypatch):
    """It was asleep between looking whose lock it is and writing it anew."""
    lock, bucket = request.getfixturevalue(f"{kind}lock"), request.getfixturevalue(f"{kind}bucket")
    replace = leases._replace

    def late(*args):
        monkeypatch.setattr(leases, "_replace", replace)
        write(bucket)
        if is_done:
            bucket.remove(".lock")
        replace(*args)

    lease = leases.Lease(lock)
    monkeypatch.setattr(leases, "_replace", late)
    lease.acquire()
    lease._thread.join(2)
    with pytest.raises(RunError, match=r"\.lock: another run took this folder"):
        lease.check()
    lease.release()
    assert is_done or json.loads(bucket.read(".lock"))["host"] == "elsewhere"
    assert bucket.names() == [".lock"] * (not is_done)


def test_a_slow_starter_does_not_remove_a_lock_that_was_taken_meanwhile(lock, bucket, monkeypatch):
    """It has seen that an old lock may go, and another removes it and takes its place before it does."""
    monkeypatch.setattr(leases, "EXPIRES", 60.0)
    write(bucket, machine=leases._machine(), process=2**22 + 1)  # it has ended
    service, other = leases.filesystem(lock), leases.Lease(lock)
    remove = service.call

    def late(*args, **kwargs):
        monkeypatch.setattr(service, "call", remove)
        other.acquire()
        return remove(*args, **kwargs)

    monkeypatch.setattr(service, "call", late)
    with pytest.raises(leases.Held):
        leases.Lease(lock).acquire()
    assert json.loads(bucket.read(".lock"))["token"] == other._token
    other.release()


@pytest.mark.parametrize("is_done", [False, True])
def test_a_holder_that_was_asleep_sees_at_once_that_it_was_replaced(lock, bucket, monkeypatch, is_done):
    """Before its next renewal, and also where the other has ended meanwhile."""
    monkeypatch.setattr(leases, "RENEWED", 3600.0)
    lease = leases.Lease(lock)
    lease.acquire()
    write(bucket)
    if is_done:
        bucket.remove(".lock")
    lease.check()  # too early for another to have taken it
    time.sleep(leases.EXPIRES / 2)
    with pytest.raises(RunError, match=r"\.lock: another run took this folder"):
        lease.check()
    lease.release()


def test_a_lock_that_cannot_be_seen_is_an_error_of_the_run(lock, bucket, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 3600.0)
    lease = leases.Lease(lock)
    lease.acquire()
    bucket.fault(status=403, path="lock")
    time.sleep(leases.EXPIRES / 2)
    with pytest.raises(RunError, match=r"\.lock: cannot be read \(Forbidden: .*; fix this"):
        lease.check()
    bucket.fault()
    lease.check()
    lease.release()


def test_a_renewal_that_fails_is_tried_again(lock, bucket):
    lease = leases.Lease(lock)
    lease.acquire()
    bucket.fault(status=403, path="lock")
    time.sleep(0.3)
    bucket.fault()
    before, deadline = json.loads(bucket.read(".lock"))["number"], time.monotonic() + 10
    while json.loads(bucket.read(".lock"))["number"] == before and time.monotonic() < deadline:
        time.sleep(0.05)
    lease.check()
    assert json.loads(bucket.read(".lock"))["number"] > before
    lease.release()
