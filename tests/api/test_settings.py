import pytest
import yaml

from klkit.api.settings import Settings


def test_round_trip_through_yaml():
    settings = Settings(p="a", q="b", rtol=0.05, samples=3, batch_size=7, unit="bits")
    assert Settings.from_mapping(yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sample": 3}, "samples"),
        ({"no_such_thing": 3}, "the options are"),
        ({"samples": 0}, "at least 1"),
        ({"samples": True}, "whole number"),
        ({"max_tokens": -1}, "at least 1"),
        ({"max_tokens": "many"}, "whole number"),
        ({"max_tokens": None}, "whole number"),
        ({"shared_only": "yes"}, "true or false"),
        ({"temperature": 0}, "above 0"),
        ({"temperature": "warm"}, "number"),
        ({"temperature": float("nan")}, "above 0"),
        ({"rtol": 2.0}, "between 0 and 1"),
        ({"seed": -1}, "non-negative"),
        ({"seed": 1.5}, "whole number"),
        ({"method": "k1"}, "rb_cv"),
        ({"divergence": "kld"}, "reverse_kl"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": "large"}, "auto"),
        ({"prompts": 3}, "quotes"),
        ({"text": "a.txt", "prompts": "b.txt"}, "leave it out"),
        ({"text": "a.txt", "samples": 3, "method": "mc"}, "samples=3, method='mc'"),
        ({"context": 64}, "context=64"),
        ({"divergence": "js", "rtol": 0.1}, "rtol=0.1"),
        ({"divergence": "jeffreys", "floor": "dtype"}, "floor='dtype'"),
        ({"divergence": "js", "method": "mc"}, "rb"),
        ({"divergence": "js", "floor": "noise"}, "floor='noise'"),
        ({"text": "a.txt", "floor": "noise"}, "floor='noise'"),
        ({"floor": "loud"}, "batch, dtype, noise, none"),
        ({"unit": "bans"}, "bits"),
        ({"group_column": "kind"}, "file of --prompts"),
        ({"group_column": "kind", "prompts": "a.csv", "divergence": "js"}, "not broken down"),
        ({"group_column": "kind", "text": "a.txt"}, "file of --prompts"),
        ({"token_js": 1}, "true or false"),
        ({"beam": 4}, "only the sums of bytes=True"),
        ({"bytes": True, "beam": 0}, "at least 1 for beam"),
        ({"bytes": True, "text": "a.txt"}, "text='a.txt'"),
        ({"bytes": True, "shared_only": True}, "shared_only=True"),
        ({"bytes": "yes"}, "true or false"),
        ({"p": None}, "'p'"),
    ],
)
def test_bad_options_say_what_to_do(options, expected):
    with pytest.raises(ValueError, match="expected") as error:
        Settings.from_mapping({"p": "a", "q": "b", **options})
    assert expected in str(error.value)
