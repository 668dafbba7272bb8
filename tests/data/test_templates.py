import pytest

from qlora.config.registries.chat_templates import TEMPLATE_NAMES, TEMPLATES
from qlora.config.schema import DataConfig
from qlora.data.chat.templates import FALLBACK, choose_template, read_template
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer

OURS = [name for name in TEMPLATE_NAMES if name != "auto"]


def base(template=None, tokens=()):
    built = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    built.add_tokens(list(tokens))
    built.chat_template = template
    return built


@pytest.mark.parametrize("name", OURS)
def test_a_name_is_the_file_of_that_name(name):
    chosen = choose_template(name, base("its own", TEMPLATES[name]))
    assert chosen == (name, read_template(name))
    assert chosen.text.startswith("{#-")


@pytest.mark.parametrize("name", OURS)
def test_a_template_names_every_token_that_it_writes(name):
    text = read_template(name)
    assert all(token in text or name == "phi-3" for token in TEMPLATES[name])
    if not TEMPLATES[name] and name != "zephyr":  # Zephyr itself writes its marks as plain text
        assert "<|" not in text
        assert "_of_turn>" not in text


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path):
    (tmp_path / "mine.jinja").write_text("\ufeff{{ messages[0].content }}", encoding="utf-8")
    assert choose_template(str(tmp_path / "mine.jinja"), base()).text == "{{ messages[0].content }}"


def test_auto_takes_the_tokenizer_s_own():
    assert choose_template("auto", base("its own")) == ("the tokenizer's own", "its own")


def test_auto_falls_back_to_plain_text():
    assert choose_template("auto", base()) == (FALLBACK, read_template(FALLBACK))
    assert not TEMPLATES[FALLBACK]


def test_of_several_the_default_is_taken():
    several = {"tool_use": "with tools", "default": "plain"}
    assert choose_template("auto", base(several)).text == "plain"
    listed = [{"name": name, "template": text} for name, text in several.items()]
    assert choose_template("auto", base(listed)).text == "plain"


def test_the_only_one_of_a_table_is_taken():
    assert choose_template("auto", base({"chat": "x"})).text == "x"


def test_several_without_a_default_are_refused():
    with pytest.raises(UserError) as raised:
        choose_template("auto", base({"rag": "a", "tool_use": "b"}))
    assert str(raised.value) == (
        "data.template=auto: the tokenizer has the chat templates rag, tool_use but no default; save the one to take "
        "as a file and give it with data.template=FILE.jinja"
    )


@pytest.mark.parametrize("name", [name for name, tokens in TEMPLATES.items() if tokens])
def test_tokens_that_the_tokenizer_lacks_are_named_with_the_way_out(name):
    first, *rest = TEMPLATES[name]
    listed = ",".join(f'"{token}"' for token in rest)
    with pytest.raises(UserError) as raised:
        choose_template(name, base(tokens=[first]), key="data.mix.a.template")
    assert str(raised.value) == (
        f"data.mix.a.template={name} writes the tokens {', '.join(rest)}, which this tokenizer does not have; add them "
        f"('model.new_tokens=[{listed}]' trains them too), or take a template of plain text, such as guanaco"
    )


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }} é", encoding="utf-8")
    assert choose_template(str(path), base("its own")) == (str(path), "{{ messages }} é")


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "mine.jinja").write_text("x")
    with pytest.raises(UserError, match=r"^data.template=\S+/mime.jinja: no such file.*/mine.jinja"):
        choose_template(str(tmp_path / "mime.jinja"), base())
    with pytest.raises(UserError, match=r"nowhere/mine\.jinja: no such file$"):
        choose_template(str(tmp_path / "nowhere" / "mine.jinja"), base())


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"latin\.jinja: cannot be read"):
        choose_template(str(tmp_path / "latin.jinja"), base())
    with pytest.raises(UserError, match="cannot be read"):
        choose_template(f"{tmp_path}/", base())


def test_an_unknown_name_is_corrected_before_any_tokenizer_is_loaded():
    with pytest.raises(UserError, match=r"^data.template='chatlm' is unknown.*chatml.*; choose one of auto, alpaca"):
        DataConfig(name="toy", path="toy.json", template="chatlm")
