"""Where the Inception network is, for clean FID. No torch."""

from __future__ import annotations

from finectl.metrics.features import ExtractorInfo, FeatureOptions


def find_inception(given: str | None) -> ExtractorInfo | None:
    """Return the Inception network where its file is on this machine, None where it is not.

    Args:
        given: A file that the user named, which must be there.

    Raises:
        InputError: the named file is missing or damaged, or clean-fid is not installed.
    """
    from finectl.metrics.features import inception
    from finectl.metrics.features.weights import cached_file

    if given is None and not cached_file(inception.NAME).is_file():
        return None
    return inception.describe(FeatureOptions(inception=given, resize_mode="clean"))
