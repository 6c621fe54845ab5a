from torchlamp.plain_table import PlainTable

TABLE = PlainTable("head <b>", ["run", "KL"], [["a", "1"], ["long & name", "22"]], ["note"], main=1)


def test_text_is_aligned():
    lines = str(TABLE).splitlines()
    assert lines == ["head <b>", "run          KL", "─" * 15, "a             1", "long & name  22", "note"]


def test_html_escapes_and_shows_the_main_row_in_bold():
    html = TABLE.to_html()
    assert "head &lt;b&gt;" in html
    assert "<b>long &amp; name</b>" in html
    assert "<b>a</b>" not in html
