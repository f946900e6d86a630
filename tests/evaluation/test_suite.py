from __future__ import annotations

import pytest

from st_llmpool.evaluation import load_suite, read_suite, shipped_suites
from st_llmpool.evaluation import tasks as tasks_module
from st_llmpool.modules.errors import ConfigurationError, DataError, StLlmpoolError
from tests.evaluation.tiny_suite import CORPUS, QRELS, QUERIES, TASKS, texts, write_suite, write_table

SEARCH = {"name": "TinySearch", "type": "Retrieval", "folder": "search"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Retreival"}, "unknown type 'Retreival'.*Did you mean 'Retrieval'"),
        ({"foldr": "x"}, "tasks.0.foldr is not a key here.*Did you mean 'folder'"),
        ({"columns": {"ids": "_id"}}, "unknown column 'ids'.*Did you mean 'id'"),
        ({"files": {"query": "q.parquet"}}, "unknown file 'query'.*Did you mean 'queries'"),
        ({"metric": "ndcg_at_11"}, "unknown metric 'ndcg_at_11'.*Did you mean 'ndcg_at_1"),
        ({"prompt": {"passage": "x"}}, "unknown prompt 'passage'; known are document, query"),
        ({"source": "docstrings"}, "needs a folder or a source, and not both"),
        ({"name": "SciFact"}, "'SciFact' is one of mteb's; name it 'LocalSciFact'"),
        ({"name": "a/b"}, "it names a file"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"limit": "many"}, "tasks.0.limit='many' must be of type int"),
        ({"columns": {"id": [3]}}, r"tasks.0.columns.id=\[3\] must be of type str"),
        ({"where": {"corpus": 3}}, "tasks.0.where.corpus=3 must hold keys and values"),
    ],
)
def test_wrong_task_is_refused_with_the_way_out(suite_of, change, message):
    with pytest.raises(ConfigurationError, match=message):
        load_suite(suite_of(SEARCH | change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [", "suite.yaml is not YAML"),
        ("- 1", "suite.yaml: The file must hold keys and values"),
        ("task: []", "suite.yaml: task is not a key here. Did you mean 'tasks'"),
        ("tasks: []", "must list tasks"),
        ("tasks: [{type: STS}]", "tasks.0.name is missing"),
    ],
)
def test_wrong_suite_file_is_refused_with_the_way_out(tmp_path, content, message):
    path = tmp_path / "suite.yaml"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        read_suite(path)


def test_task_names_must_differ(suite_of):
    with pytest.raises(ConfigurationError, match="each name once; it has TinySearch, TinySearch"):
        load_suite(suite_of(SEARCH, SEARCH))


def test_unknown_suite_and_task_are_refused_with_the_nearest(suite):
    with pytest.raises(
        DataError, match=r"'squd' is neither a file nor one of builtin, open, squad, .* Did you mean 'squad'"
    ):
        read_suite("squd")
    with pytest.raises(ConfigurationError, match=r"has no task 'TinySerch'.*Did you mean 'TinySearch'"):
        load_suite(suite, tasks=["TinySerch"])


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("search/corpus", {"id": ["d0"], "text": ["a"]}, "qrels name 'd.*, not in the corpus file"),
        ("search/queries", QUERIES | {"id": ["q0"] * 12}, "queries file holds id 'q0' more than once"),
        ("search/queries", {"id": QUERIES["id"], "txt": QUERIES["text"]}, "no column 'text'.*Did you mean 'txt'"),
        ("search/qrels", QRELS | {"score": [0.5] * 24}, "'score' holds 0.5 in row 1, expected an integer"),
        ("pairs/test", {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}, r"labels are \[1\], expected both"),
        ("classes/test", {"text": ["a"], "label": ["boat"]}, "test labels 'boat' do not occur in the training split"),
        ("sts/test", {"sentence1": ["a"], "sentence2": ["b"], "score": [None]}, "holds None in row 1"),
    ],
)
def test_wrong_data_are_refused_when_the_suite_is_loaded(suite, table, content, message):
    write_table(suite.parent / f"{table}.parquet", content)
    with pytest.raises(DataError, match=message):
        load_suite(suite)


def test_missing_folder_is_named_with_the_nearest(suite_of, tmp_path):
    with pytest.raises(DataError, match=r"lacks 1 of the 1 data sets .*: serch\..*Did you mean 'search'"):
        load_suite(suite_of(SEARCH | {"folder": "serch"}))
    with pytest.raises(DataError, match=r"say where they are .data_dir, or --data DIR"):
        load_suite("squad")


def test_revision_changes_with_data_and_settings_and_with_nothing_else(suite_of, tmp_path):
    def revision(limit=None, folder=None, **change):
        path = suite_of(SEARCH | change) if folder is None else write_suite(folder, [SEARCH])
        return load_suite(path, limit=limit)[0].metadata.revision

    first = revision()
    assert revision(folder=tmp_path / "moved") == first
    changed = {first, revision(limit=5), revision(prompt="query: "), revision(metric="ndcg_at_1")}
    suite = suite_of(SEARCH)
    write_table(suite.parent / "search/corpus.parquet", CORPUS | {"text": texts(40, 99)})
    changed.add(load_suite(suite)[0].metadata.revision)
    assert len(changed) == 5


@pytest.mark.parametrize("limit", [3, 10])
def test_limit_holds_for_every_task(suite, limit):
    for task in load_suite(suite, limit=limit):
        task.load_data()
        data = task.dataset.get("test") or task.dataset["default"]["test"]
        if task.metadata.type == "Retrieval":
            assert len(data["corpus"]) == limit
        assert len(data["queries"] if task.metadata.type in ("Retrieval", "Reranking") else data) <= limit, task


def test_shipped_suites_are_well_formed():
    names = [task.name for suite in shipped_suites() for task in read_suite(suite).tasks]
    assert len(names) == len(set(names))
    assert {"builtin", "squad"} <= set(shipped_suites())


def test_builtin_suite_searches_docstrings_of_the_test_split(monkeypatch):
    asked = []

    class Pair:
        def __init__(self, number):
            self.query, self.positive, self.negative = f"query {number}", f"document {number}", "other"

    def pairs(split):
        asked.append(split)
        return [Pair(number) for number in range(900)]

    monkeypatch.setattr(tasks_module, "docstring_pairs", pairs)
    (task,) = load_suite("builtin")
    task.load_data()
    data = task.dataset["default"]["test"]
    assert set(asked) == {"test"}
    assert len(data["corpus"]) == len(data["queries"]) == 500
    assert set(data["corpus"]["text"]) == {query.replace("query", "document") for query in data["queries"]["text"]}


def test_squad_suite_reads_the_shared_sets(shared_data):
    tasks = load_suite("squad", shared_data, limit=50)
    assert [task.metadata.type for task in tasks] == ["Retrieval", "STS", "Classification", "Clustering", "Clustering"]


def test_open_suite_reads_every_shared_set_as_one_task(shared_data2):
    tasks = load_suite("open", shared_data2, limit=20)
    folders = {path.name for path in shared_data2.iterdir() if path.is_dir()} - {"train_pairs"}
    assert {task.metadata.dataset["path"] for task in tasks} == folders
    assert len(tasks) == len(folders)
    assert {task.metadata.type for task in tasks} == set(tasks_module.TASK_TYPES)


def test_a_task_has_a_corpus_and_a_language(suite_of):
    (own,) = load_suite(suite_of(SEARCH))
    (named,) = load_suite(suite_of(SEARCH | {"corpus": "manuals", "language": "deu-Latn"}))
    assert (own.corpus, own.metadata.eval_langs) == ("search", ["eng-Latn"])
    assert (named.corpus, named.metadata.eval_langs) == ("manuals", ["deu-Latn"])
    assert own.metadata.revision == named.metadata.revision  # the scores are the same


def test_an_instruction_is_a_prompt_only_where_a_template_is_given(suite_of):
    suite = suite_of(SEARCH | {"instruction": "Find it"}, {"name": "S", "type": "STS", "folder": "sts"})
    plain, followed = load_suite(suite), load_suite(suite, instruct="Task: {} | ")
    assert [task.metadata.prompt for task in plain] == [None, None]
    assert [task.metadata.prompt for task in followed] == [{"query": "Task: Find it | "}, None]
    assert plain[0].metadata.revision != followed[0].metadata.revision


@pytest.mark.logs_warning
def test_missing_sets_are_left_out_only_on_request(suite_of, caplog):
    suite = suite_of(
        SEARCH, {"name": "Gone", "type": "STS", "folder": "gone"}, {"name": "Lost", "type": "STS", "folder": "lost"}
    )
    with pytest.raises(DataError, match=r"lacks 2 of the 3 data sets .*: gone, lost\."):
        load_suite(suite)
    with caplog.at_level("WARNING"):
        assert [task.metadata.name for task in load_suite(suite, allow_missing=True)] == ["TinySearch"]
    assert "Left out, without data: Gone, Lost." in caplog.text
    with pytest.raises(DataError, match="lacks 1 of the 1"):
        load_suite(suite, tasks=["Gone"], allow_missing=True)


def test_every_error_is_of_our_family(suite_of):
    for task in (TASKS[0] | {"type": "x"}, TASKS[0] | {"folder": "x"}):
        with pytest.raises(StLlmpoolError):
            load_suite(suite_of(task))
