"""Refusal of a setting that is out of its range."""


def expect(name: str, value: object, fits: bool, expected: str) -> None:
    """Return if a setting's value fits.

    Raises:
        ValueError: it does not; the message names the setting, its range and its value.
    """
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value}")
