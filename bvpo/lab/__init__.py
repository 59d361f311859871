"""The laboratory: reasoning models whose every trace can be enumerated, and one check per statement of the theory.

It sees records, config and core only, so what it verifies are the losses, the mixing and the estimators that ship. The verb
``bvpo lab`` runs it (:mod:`bvpo.lab.experiment` is the entrance); nothing here reads or writes a file.
"""
