"""What a run remembers from step to step."""

from igrpo_jax.session.progress import Progress


def test_of_programs_of_a_kind_the_first_is_named_once():
    progress = Progress()
    assert progress.first_of_their_kind([]) == []
    compiled = ["decode 16 128", "apply", "decode 16 256"]
    assert sorted(progress.first_of_their_kind(compiled)) == ["apply", "decode 16 128"]
    assert progress.first_of_their_kind(["decode 8 128", "harvest"]) == ["harvest"]
