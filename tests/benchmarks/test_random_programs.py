"""What benchmarks/coverage/random_programs.py counts, and that a seed gives the same programs again."""

from __future__ import annotations

from benchmarks.coverage.random_programs import Drawn, Outcome, Recorder, Tally
from fa3_compile.lower import choose


def test_a_number_of_a_seed_is_one_program() -> None:
    def drawn(count: int) -> list[str]:
        found: list[str] = []
        Drawn(5, count, "cpu", None).each(lambda _, program: found.append(repr(program)))
        return found

    assert drawn(40)[:25] == drawn(25)
    assert len(set(drawn(40))) > 30


def test_the_family_that_did_the_work_is_counted(monkeypatch) -> None:
    class First(choose.Kernel):
        name = "first"

        def run(self, *arguments):
            return second.run(*arguments)

    class Second(choose.Kernel):
        name = "second"

        def run(self, *arguments):
            return arguments

    first, second = First(), Second()
    monkeypatch.setattr(choose, "kernels", lambda: [first, second])
    recorder = Recorder()
    recorder.install()
    assert first.run(1, 2) == (1, 2)
    assert recorder.take() == {"forward kernel": "second", "backward kernel": ""}
    assert recorder.take() == {"forward kernel": "", "backward kernel": ""}


def test_the_file_has_a_row_for_each_value_of_a_part(tmp_path) -> None:
    tally = Tally()
    tally.add(Outcome(1, {"mask": "causal"}, fused=1, wrong=""))
    tally.add(Outcome(2, {"mask": "causal"}, fused=0, wrong="numbers"))
    tally.add(Outcome(3, {"mask": "window"}, fused=1, wrong=""))
    assert str(tally) == "3 programs (2 distinct), 1 wrong"
    tally.write(tmp_path / "out.csv", "about")
    _, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert rows == [
        "part,value,programs,fused,left,wrong",
        "all,,3,2,1,1",
        "mask,causal,2,1,1,1",
        "mask,window,1,1,0,0",
    ]


def test_a_family_has_one_kernel_and_many_layouts() -> None:
    found: list[dict[str, str]] = []
    Drawn(5, 10, "cpu", None, family=10).each(lambda _, program: found.append(program.made_of))
    assert len({x["layout"] for x in found}) > 3
    assert len({x.get("masks", x.get("mask mods", x.get("attn_mask"))) for x in found}) == 1
