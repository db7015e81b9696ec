"""The files of identities: read with a remedy, written whole or not at all, watched for change."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from noren.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LOCK_SECONDS = 30.0
_KEY_BLOCK = re.compile(rb"-----BEGIN [^-]+-----.*?-----END [^-]+-----", re.DOTALL)

Signature = tuple[tuple[int, ...], ...]


def signature(*paths: Path) -> Signature:
    """Return what changes when one of the files does: times, size and inode; of a missing file, nothing."""

    def of(path: Path) -> tuple[int, ...]:
        try:
            found = path.stat()
        except FileNotFoundError:
            return ()
        except OSError as error:
            return (error.errno or 0,)
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    return tuple(of(path) for path in paths)


def read(path: Path, what: str, remedy: str) -> bytes:
    """Return a file's bytes. Raises ConfigError with the remedy if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"the {what} {path} is missing: {remedy}") from None
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be read ({error.strerror}): {remedy}") from None


def certificates(path: Path, pem: bytes, remedy: str) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, one or more. Raises ConfigError with the remedy."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(f"{path} is not a certificate in PEM form: {remedy}") from None


def private_key(path: Path, pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the private key of a PEM file. Raises ConfigError if it is none that Noren makes."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    remedy = "use the file that was written beside the certificate"
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(f"{path} is encrypted, which is not supported: {remedy}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is not a private key in PEM form: {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an ECDSA key: {remedy}")
    return key


def private_keys(path: Path, pem: bytes) -> list[ec.EllipticCurvePrivateKey]:
    """Return the private keys of a PEM file that holds one after another. Raises ConfigError."""
    return [private_key(path, block) for block in _KEY_BLOCK.findall(pem)]


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, not encrypted."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_private(folder: Path) -> None:
    """Make `folder` with mode 0700; one that exists is closed to others only if it is empty. Raises ConfigError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if os.name != "posix" or not mode & 0o077:
            return
        if any(folder.iterdir()):
            raise ConfigError(
                f"{folder} is open to others (mode {mode:04o}) and holds other files: choose a new folder "
                f"with --dir, or close it with `chmod 700 {shlex.quote(str(folder))}`"
            )
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be made ({error.strerror}): choose another one with --dir"
        ) from None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from changing the authority in `folder`. Raises ConfigError."""
    import filelock

    lock = filelock.FileLock(folder / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout:
        raise ConfigError(
            f"another process has been writing in {folder} for {LOCK_SECONDS:g} s: wait for it or end it"
        ) from None
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def write(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Write files of one folder, each whole or not at all: temporary files, fsync, then renames in order.

    `files`: path -> (bytes, mode). Raises ConfigError.
    """
    folder = next(iter(files)).parent
    temporary: dict[Path, str] = {}
    try:
        for path, (data, mode) in files.items():
            descriptor, temporary[path] = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder)
            with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary[path], mode)
        for path in files:
            os.replace(temporary[path], path)
            del temporary[path]
        if os.name == "posix":
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                os.unlink(leftover)


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write in {folder} ({error.strerror}): make it writable, or choose another one with --dir"
    )
