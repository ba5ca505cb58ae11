"""A guide to handloom in six pages. The code of each page, and every file in `docs/recipes/`, is run by the tests.

.. include:: 1_first_run.md
.. include:: 2_parameters.md
.. include:: 3_states.md
.. include:: 4_speed.md
.. include:: 5_seeds.md
<<<<<<< HEAD
.. include:: 6_your_strategy.md
=======
.. include:: 6_experiments.md
>>>>>>> 36219c9 (docs: experiments, with the plan that asks about min-p; names of tests are unique)
"""
