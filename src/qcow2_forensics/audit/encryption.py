"""Rules about encryption: what is weak, broken, or not encrypted at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..findings import Evidence, Severity
from ..format.header import Crypt
from .facts import Facts
from .rules import QEMU_MADE, Chapter, of_fields

if TYPE_CHECKING:
    from ..reader.encryption.luks import LuksHeader

rule = Chapter(__name__, "Encryption")

_HEADER = 592  # bytes of a LUKS1 header
_FEW_ITERATIONS = 1000
_TWO_TIB = 2 << 40  # where the plain generator's 32-bit sector number wraps


def _area(facts: Facts) -> tuple[int, int] | None:
    """Return where the LUKS header is, None when there is none inside the file."""
    if facts.header.version == 1 or facts.header.crypt_method != Crypt.LUKS:
        return None
    area = facts.image.crypto_header
    if area is None or area[0] + _HEADER > facts.image.file_size:
        return None
    return area


def _luks(facts: Facts) -> LuksHeader | None:
    area = _area(facts)
    if area is None:
        return None
    from ..reader.encryption.luks import parse_luks_header  # hashlib and OpenSSL: only where there is such a header

    return parse_luks_header(facts.read(area[0], _HEADER), area[1])


def _sound(facts: Facts) -> tuple[LuksHeader, int] | None:
    """Return the header and its offset when it is one."""
    area, header = _area(facts), facts.once(_luks)
    if area is None or header is None or header.magic != b"LUKS\xba\xbe" or header.version != 1:
        return None
    return header, area[0]


rule(
    "QCOW2-LEGACY-AES",
    Severity.MEDIUM,
    "legacy AES encryption",
    note="the key is the first 16 bytes of the passphrase, a wrong one is not detected, and sectors are numbered "
    "predictably; system emulators no longer open such images, tools do",
    when="crypt_method is 1",
    validated=QEMU_MADE,
)(of_fields(lambda facts: facts.header.crypt_method == Crypt.AES, "crypt_method"))


@rule(
    "QCOW2-CRYPTO-HEADER-INVALID",
    Severity.HIGH,
    "the LUKS header is missing or damaged",
    note="the image cannot be unlocked as it is: consistent with a destroyed or detached header",
    when="LUKS without its extension, a header outside the file, or a wrong magic, version, stripe count or key slot",
)
def crypto_header_invalid(facts: Facts) -> Iterator[Evidence]:
    for problem in facts.problems("QCOW2-CRYPTO-HEADER-INVALID"):
        yield facts.problem_evidence(problem)
    if facts.header.version == 1 or facts.header.crypt_method != Crypt.LUKS:
        return
    place = facts.image.crypto_header
    if place is None:
        return
    offset, length = place
    if offset + _HEADER > facts.image.file_size or length < _HEADER:
        yield Evidence("luks_header_offset", offset, structure="LUKS header")
        yield Evidence("luks_header_length", length, structure="LUKS header")
        return
    header = facts.once(_luks)
    for fault in header.problems if header is not None else ():
        yield Evidence(f"{fault.field}: {fault.message}", None, offset + fault.offset, structure="LUKS header")


@rule(
    "QCOW2-LUKS-DETAILS",
    Severity.INFO,
    "LUKS parameters",
    note="a fingerprint for matching other media",
    when="the LUKS header can be parsed",
    validated=QEMU_MADE,
)
def luks_details(facts: Facts) -> Iterator[Evidence]:
    found = _sound(facts)
    if found is None:
        return
    header, at = found
    place = "LUKS header"
    yield Evidence("uuid", header.uuid, at + 168, 40, place)
    yield Evidence("cipher", f"{header.cipher_name}-{header.cipher_mode}", at + 8, 64, place)
    yield Evidence("hash", header.hash_spec, at + 72, 32, place)
    yield Evidence("key_bits", header.key_bytes * 8, at + 108, 4, place)
    yield Evidence("digest_iterations", header.mk_digest_iterations, at + 164, 4, place)
    for slot in header.slots:
        if slot.is_active:
            yield Evidence(f"slot_{slot.index}_iterations", slot.iterations, at + slot.offset, 48, place)


@rule(
    "QCOW2-LUKS-ERASED-SLOT",
    Severity.MEDIUM,
    "an inactive key slot still holds key material",
    note="consistent with a removed passphrase: QEMU leaves unused slots zero and fills erased ones with random bytes",
    when="a slot is inactive and its key material is not zeros",
    harmless="headers made by cryptsetup have random bytes in unused slots",
    validated=QEMU_MADE,
)
def luks_erased_slot(facts: Facts) -> Iterator[Evidence]:
    found, area = _sound(facts), _area(facts)
    if found is None or area is None:
        return
    from ..reader.encryption.luks import STRIPES

    header, at = found
    for slot in header.slots:
        if slot.is_active or slot.stripes != STRIPES:  # other stripes are reported with the header
            continue
        length = min(header.material_bytes(slot), facts.limits.luks_payload_bytes)
        if not slot.key_material_offset or slot.key_material_offset + length > area[1]:
            continue
        data = facts.read(at + slot.key_material_offset, length)
        if any(data):
            nonzero = len(data) - data.count(0)
            yield Evidence(
                f"slot_{slot.index}_nonzero", nonzero, at + slot.key_material_offset, len(data), "key material"
            )


@rule(
    "QCOW2-WEAK-CRYPTO",
    Severity.MEDIUM,
    "weak LUKS parameters",
    note="a configuration with known weaknesses",
    when="ECB or CTR mode, the plain generator on more than 2 TiB, MD5, or an active slot below 1,000 iterations",
    validated=QEMU_MADE,
)
def weak_crypto(facts: Facts) -> Iterator[Evidence]:
    found = _sound(facts)
    if found is None:
        return
    header, at = found
    mode, _, generator = header.cipher_mode.partition("-")
    if mode in ("ecb", "ctr"):
        yield Evidence("cipher_mode", header.cipher_mode, at + 40, 32, "LUKS header")
    if generator == "plain" and facts.header.size > _TWO_TIB:
        yield Evidence("ivgen", header.cipher_mode, at + 40, 32, "LUKS header")
    if header.hash_spec == "md5":
        yield Evidence("hash", header.hash_spec, at + 72, 32, "LUKS header")
    for slot in header.slots:
        if slot.is_active and slot.iterations < _FEW_ITERATIONS:
            yield Evidence(f"slot_{slot.index}_iterations", slot.iterations, at + slot.offset + 4, 4, "LUKS header")
