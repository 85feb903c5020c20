"""Readable names of labels."""

from pipeline.names.readable import readable_labels


def test_numbers_of_synsets_and_underscores_are_removed():
    assert readable_labels(("n01440764_tench", "hubble_deep_field", "tabby, tabby cat", "n01580077-jay", "")) == (
        "tench",
        "hubble deep field",
        "tabby, tabby cat",
        "jay",
        "",
    )


def test_a_bare_synset_is_named_by_its_first_word():
    assert readable_labels(("n02123045", "n99999999")) == ("tabby", "n99999999")


def test_labels_of_one_name_stay_apart():
    names = readable_labels(("n02012849_crane", "n03126707_crane", "a_b", "a b"))
    assert names == ("crane (n02012849)", "crane (n03126707)", "a_b", "a b")


def test_what_only_begins_like_a_synset_is_kept():
    assert readable_labels(("n01440764x", "n0144", "_")) == ("n01440764x", "n0144", "_")
