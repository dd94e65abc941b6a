"""What ranks leave for each other: first words, who is gone, and how long anybody waits."""

import pytest
from torch.distributed import HashStore

from bilevel.errors import LostRankError
from bilevel.run import notices
from bilevel.run.notices import Notices, Word


@pytest.fixture
def three(monkeypatch):
    """Those of three ranks, of which nobody is waited for long."""
    monkeypatch.setattr(notices, "GRACE", 0.05)
    store = HashStore()
    return [Notices(store, rank, 3) for rank in range(3)]


def test_the_first_word_is_the_cause_and_each_rank_has_one(three):
    assert three[0].cause() is None
    three[2].leave(7, "my own error")
    three[1].leave(5, "another")
    three[2].leave(1, "too late")
    assert three[0].cause() == Word(2, 7, "my own error") == three[0].word(2)
    assert three[0].word(1) == Word(1, 5, "another")
    assert three[0].word(0) is None


def test_who_lost_another_is_no_cause(three):
    three[1].leave(1, "waited in vain", is_cause=False)
    assert three[0].cause() is None
    three[2].leave(7, "my own error")
    assert three[0].cause() == Word(2, 7, "my own error")


def test_one_that_waits_in_vain_tells_the_word_of_another_with_its_code(three):
    three[2].leave(5, "step 3: upper_loss = nan")
    error = three[0].lost("Connection closed by peer")
    assert (str(error), error.exit_code) == ("rank 2: step 3: upper_loss = nan", 5)
    assert error.is_told
    own = three[2].lost("Connection closed by peer")  # its own word tells it nothing
    assert not own.is_told


@pytest.mark.parametrize(
    ("alive", "said"),
    [
        ([1], "rank 2 of 3 is gone without a word: killed"),
        ([], "rank 1 or 2 of 3 is gone without a word: killed"),
        ([1, 2], "rank 0 of 3 waited in vain: it took too long"),
    ],
)
def test_who_does_not_say_that_he_lives_is_gone(alive, said, three):
    for rank in alive:
        three[rank].lost("")
    error = three[0].lost("it took too long")
    assert str(error).startswith(said)
    assert (error.exit_code, error.is_told) == (1, False)


def test_who_does_not_come_in_time_need_not_be_gone(three):
    three[1].lost("")
    said = str(three[0].lost("Timed out waiting 1000ms for recv operation to complete"))
    assert said.startswith("rank 2 of 3 does not come to a sum: it hangs, or its work takes longer")
    assert "1000ms" in said


def test_ranks_meet_once_all_are_there(three):
    with pytest.raises(LostRankError, match=r"^ranks 1, 2 of 3 did not come within 0 s$"):
        three[0].meet(0.05)
    with pytest.raises(LostRankError, match=r"^rank 2 of 3 did not come within 0 s$"):
        three[1].meet(0.05)
    for one in reversed(three):
        one.meet(0.05)


def test_who_waits_for_ranks_hears_that_one_has_failed(three):
    three[2].leave(3, "no CUDA device")
    with pytest.raises(LostRankError, match=r"^rank 2: no CUDA device$") as caught:
        three[0].meet(60.0)
    assert caught.value.exit_code == 3
    with pytest.raises(LostRankError, match=r"^rank 2: no CUDA device$"):
        three[1].told(60.0)


def test_what_the_first_tells_and_how_it_ends(three):
    with pytest.raises(LostRankError, match=r"^rank 0 of 3 did not come within 0 s$"):
        three[1].told(0.05)
    three[0].tell({"run": "runs/a"})
    assert three[1].told(0.05) == {"run": "runs/a"}
    assert three[1].ended() is None
    three[0].end(143)
    assert three[1].ended() == 143


def test_a_store_that_is_gone_says_nothing_and_has_an_error(monkeypatch):
    monkeypatch.setattr(notices, "GRACE", 0.05)

    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Broken pipe")

    gone = Notices(Gone(), 1, 3)
    gone.leave(5, "heard by nobody")
    gone.end(5)
    assert gone.cause() is None
    with pytest.raises(LostRankError, match="the store of the ranks is gone"):
        gone.ended()
    assert str(gone.lost("closed")).startswith("rank 0 or 2 of 3 is gone")


def test_all_have_begun_once_each_says_so(three):
    for one in three:
        assert not three[0].have_begun()
        one.begin()
    assert three[0].have_begun()
