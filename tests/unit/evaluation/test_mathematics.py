import time

import pytest

from lowrank_kit.evaluation.mathematics import final_answer, is_right


def right(answer, gold):
    return is_right(rf"So it is $\boxed{{{answer}}}$.", rf"We get $\boxed{{{gold}}}$.")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\frac{1}{2}", "0.5"), (r"\frac12", r"\dfrac{2}{4}"), ("(x-1)(x+1)", "x^2-1"), ("1{,}000", "1000"),
        (r"\text{Evelyn}", r"\text{Evelyn}"), ("[2,5)", r"\left[2, 5\right)"), ("52_8", "52_{8}"),
        (r"2\sqrt{2}", r"\sqrt{8}"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)  # fmt: skip
def test_what_means_the_same_is_right(answer, gold):
    assert right(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("0.51", "0.5"), (r"\text{Bob}", r"\text{Evelyn}"), ("[2,5]", "[2,5)"), ("52_9", "52_8"), ("(2,1)", "(1,2)"),
        (r"\text{(B)}", r"\text{(A)}"), (r"\frac{", "5"), (r"\$\%", "5"), (r"\text{nonsense}", "3"), ("x_2", "x_1"),
        (r"\{\}", "5"), ("", "5"), (r"\infty", r"-\infty"), (r"\foo{1}", r"\bar{2}"),
    ],
)  # fmt: skip
def test_what_cannot_be_parsed_or_means_something_else_is_wrong(answer, gold):
    assert not right(answer, gold)


@pytest.mark.parametrize("text", ["", "The answer is 5.", r"\boxed", r"\boxed{", "5"])
def test_a_text_without_a_final_answer_is_wrong(text):
    assert not is_right(text, r"\boxed{5}")


def test_nothing_is_equal_to_no_answer():
    for text in ("", "no answer", r"\boxed{5}"):
        with pytest.raises(ValueError, match="no answer in the solution"):
            is_right(text, "no answer")


def test_minervas_last_sentence_goes_before_a_box():
    said = r"first $\boxed{4}$" + "\nFinal Answer: The final answer is $\\frac{1}{2}$. I hope it is correct."
    assert final_answer(said) == r"\frac{1}{2}"
    assert final_answer(r"$\boxed{1}$ and then $\boxed{\text{no, }2}$.") == r"\text{no, }2"
    assert final_answer(r"\fbox{7}") == "7"


def test_an_answer_is_never_run_as_python(tmp_path):
    file = tmp_path / "x"
    assert not right(f"__import__('pathlib').Path('{file}').touch()", "5")
    assert not file.exists()


def test_a_number_too_large_to_compute_is_given_up():
    started = time.monotonic()
    assert not right("9^{9^{9^{9}}}", "5")
    assert time.monotonic() - started < 20
