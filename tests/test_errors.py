"""How a script ends and what it says: a warning of the package in one line."""

import warnings

from bnn_jax.errors import exit_code_of
from bnn_jax.training.step_size import StepSizeWarning


def test_a_warning_of_the_package_is_one_sentence_and_others_keep_their_form(capsys, recwarn):
    def main():
        warnings.simplefilter("always")
        warnings.warn("gamma was 1", StepSizeWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    before = warnings.showwarning
    assert exit_code_of(main) == 0
    assert capsys.readouterr().err == "warning: gamma was 1\n"
    assert [str(warning.message) for warning in recwarn] == ["something else"]
    assert warnings.showwarning is before
