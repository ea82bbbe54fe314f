"""The kernels behind :mod:`klkit.divergences.fused`: one contract, several ways to meet it.

A backend is a module with three functions on rows of raw logits ``a`` (of ``p``) and ``b`` (of ``q``), each
``(m, v)`` in fp64, fp32, bf16 or fp16, computing in at least single precision and allocating nothing of
the logits' size:

``row_sums(a, b)``
    the table of :class:`klkit.divergences.sums.RowSums`, ``(m, COLUMNS)`` in double precision.

``second_sweep(a, b, norms, *, overwrite)``
    ``(m, 3)`` in double precision: the Jensen-Shannon divergence, ``KL(p‖½p + ½q)``, and the total variation.
    With ``overwrite``, ``a`` is left holding the probabilities of ``p``.

``gradients(a, b, tokens, norms, slopes, out_a, out_b)``
    into ``out_a`` and ``out_b`` (either may be None, or the logits themselves) the gradients that
    :class:`klkit.divergences.sums.Slopes` spells out.

``norms`` is :class:`klkit.divergences.sums.Norms` as a table ``(m, 4)`` in double precision.
"""
