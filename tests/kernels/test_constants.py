"""Constants of the native kernels against those of the references."""

from torchlamp.kernels import constants, native


def test_the_extension_exports_the_constants_of_the_references():
    exported = native.extension().CONSTANTS
    assert constants.shared() == exported
