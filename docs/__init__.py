"""A guide to handloom in eight pages. The code of each page, and every file in `docs/recipes/`, is run by the tests.

.. include:: 1_first_run.md
.. include:: 2_parameters.md
.. include:: 3_states.md
.. include:: 4_speed.md
.. include:: 5_seeds.md
.. include:: 6_your_strategy.md
.. include:: 7_experiments.md
.. include:: 8_server.md
"""
