"""Names of classes and the labels that they mean.

python -m pytest tests/utils/sampling/test_labels.py
"""

import pytest

from models.checks.errors import UserError
from utils.sampling.labels import label_of, labels_of, names_by_label, readable_names, short_name

WORDNET = ["n01440764", "n02099601", "n02012849", "n03126707", "n02445715", "n99999999"]
DIGITS = [str(digit) for digit in range(10)]


def test_wordnet_ids_become_readable_and_other_names_stay():
    names = readable_names([*WORDNET, "my dogs"])
    assert names[:2] == ["tench, Tinca tinca", "golden retriever"]
    assert names[5:] == ["n99999999", "my dogs"]  # an id of nobody, a name of the user's
    assert readable_names(DIGITS) == DIGITS
    assert names_by_label(["", "a", ""]) == {"1": "a"} and names_by_label(["", ""]) is None


@pytest.mark.parametrize("names", [WORDNET, readable_names(WORDNET)])
def test_a_name_means_its_class_whatever_its_case_blanks_and_synonym(names):
    for given in ("golden retriever", "Golden_Retriever", " GOLDEN  RETRIEVER ", "1", 1):
        assert label_of(given, names) == 1
    for given in ("tench", "Tinca tinca", "tench, Tinca tinca"):
        assert label_of(given, names) == 0


def test_an_id_is_a_name_too():
    assert label_of("n02099601", WORDNET) == 1


def test_a_number_in_text_is_a_label_unless_a_class_is_called_so():
    assert [label_of(digit, DIGITS) for digit in DIGITS] == list(range(10))
    months = ["1", "10", "2"]  # folders in the order of their names
    assert (label_of("10", months), label_of("0", months), label_of(2, months)) == (1, 0, 2)


def test_names_that_differ_in_their_case_are_told_apart_by_it():
    assert (label_of("cat", ["Cat", "cat"]), label_of("Cat", ["Cat", "cat"])) == (1, 0)


@pytest.mark.parametrize(
    ("given", "names", "words"),
    [
        ("golden retreiver", WORDNET, r"did you mean 'golden retriever' \(1\)"),
        ("retriever", WORDNET, r"did you mean 'golden retriever' \(1\)"),
        ("CRANE", WORDNET, r"several classes, 2 \(crane\), 3 \(crane\): give the number"),
        ("6", WORDNET, "no class 6: the labels are 0 to 5"),
        (-1, DIGITS, "no class -1: the labels are 0 to 9"),
        ("three", DIGITS, "give the name of one, e.g. '0', or a label, 0 to 9"),
        ("dog", [""] * 1000, "names of the classes are not recorded: give a label, 0 to 999"),
        ("", WORDNET, "no class ''"),
        ("9" * 5000, DIGITS, "no class"),
    ],
)
def test_what_is_no_class_is_one_line_with_what_to_write(given, names, words):
    with pytest.raises(UserError, match=words) as caught:
        label_of(given, names)
    assert "\n" not in str(caught.value)


def test_words_with_commas_are_several_classes_or_one_name():
    known = readable_names(WORDNET)
    assert labels_of(["1,tench"], WORDNET, known) == (1, 0)
    assert labels_of(["tench, Tinca tinca", "n02099601"], WORDNET, known) == (0, 1)
    assert labels_of(["5"], [], [""] * 6) == (5,)  # names that nobody knows
    with pytest.raises(UserError, match="class 0 is named twice"):
        labels_of(["tench,Tinca tinca"], WORDNET, known)


def test_titles_are_first_synonyms_and_a_number_says_that_it_is_one():
    assert short_name("tench, Tinca tinca", 0) == "tench"
    assert short_name("", 7) == short_name("7", 7) == "class 7"
