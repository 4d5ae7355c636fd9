"""What `python -m igrpo_jax.report` is made of: reading runs, judging them, plots, sample data, pages."""
