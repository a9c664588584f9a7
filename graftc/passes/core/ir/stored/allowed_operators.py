"""Operators that a graph in a file may name: a literal list, checked against rules by ``python -m tools.operators``.

They compute tensors from tensors and numbers. None of them reads or writes a file, changes a storage or its size,
addresses memory by explicit strides, or sets a generator; those whose names end with ``_`` change only their first
argument (`graftc.passes.core.ir.effects` checks whether they may). The list contains the operators emitted by captures
of transformers' architectures and by graftc's methods, and ATen's other functions of the same kinds.
"""

from __future__ import annotations

_NAMES = """
aten.__and__.Scalar aten.__and__.Tensor aten.__lshift__.Scalar aten.__lshift__.Tensor aten.__or__.Scalar
aten.__or__.Tensor aten.__rshift__.Scalar aten.__rshift__.Tensor aten.__xor__.Scalar aten.__xor__.Tensor
aten._assert_scalar.default aten._assert_tensor_metadata.default aten._grouped_mm.default aten._safe_softmax.default
aten._to_copy.default aten._unique2.default aten._unsafe_view.default aten._weight_norm.default aten.abs.default
aten.abs_.default aten.acos.default aten.acosh.default aten.adaptive_avg_pool1d.default
aten.adaptive_avg_pool2d.default aten.adaptive_avg_pool3d.default aten.adaptive_max_pool1d.default
aten.adaptive_max_pool2d.default aten.adaptive_max_pool3d.default aten.add.Scalar aten.add.Tensor aten.add_.Scalar
aten.add_.Tensor aten.addbmm.default aten.addcdiv.default aten.addcdiv_.default aten.addcmul.default
aten.addcmul_.default aten.addmm.default aten.addmm.dtype aten.addmm_.default aten.addmv.default aten.addr.default
aten.adjoint.default aten.affine_grid_generator.default aten.alias.default aten.all.default aten.all.dim aten.all.dims
aten.alpha_dropout.default aten.amax.default aten.amin.default aten.aminmax.default aten.angle.default aten.any.default
aten.any.dim aten.any.dims aten.arange.default aten.arange.start aten.arange.start_step aten.arccos.default
aten.arccosh.default aten.arcsin.default aten.arcsinh.default aten.arctan.default aten.arctan2.default
aten.arctanh.default aten.argmax.default aten.argmin.default aten.argsort.default aten.argsort.stable
aten.argwhere.default aten.as_tensor.bool aten.as_tensor.default aten.as_tensor.float aten.as_tensor.int
aten.asin.default aten.asinh.default aten.atan.default aten.atan2.default aten.atanh.default aten.atleast_1d.Sequence
aten.atleast_1d.default aten.atleast_2d.Sequence aten.atleast_2d.default aten.atleast_3d.Sequence
aten.atleast_3d.default aten.avg_pool1d.default aten.avg_pool2d.default aten.avg_pool3d.default aten.baddbmm.default
aten.baddbmm.dtype aten.baddbmm_.default aten.bartlett_window.default aten.bartlett_window.periodic
aten.batch_norm.default aten.batch_norm_elemt.default aten.batch_norm_gather_stats.default
aten.batch_norm_gather_stats_with_counts.default aten.batch_norm_stats.default aten.batch_norm_update_stats.default
aten.bernoulli.default aten.bernoulli.p aten.bernoulli_.Tensor aten.bernoulli_.float aten.bilinear.default
aten.binary_cross_entropy.default aten.binary_cross_entropy_with_logits.default aten.bincount.default
aten.bitwise_and.Scalar aten.bitwise_and.Scalar_Tensor aten.bitwise_and.Tensor aten.bitwise_and_.Tensor
aten.bitwise_left_shift.Scalar_Tensor aten.bitwise_left_shift.Tensor aten.bitwise_left_shift.Tensor_Scalar
aten.bitwise_not.default aten.bitwise_not_.default aten.bitwise_or.Scalar aten.bitwise_or.Scalar_Tensor
aten.bitwise_or.Tensor aten.bitwise_or_.Tensor aten.bitwise_right_shift.Scalar_Tensor aten.bitwise_right_shift.Tensor
aten.bitwise_right_shift.Tensor_Scalar aten.bitwise_xor.Scalar aten.bitwise_xor.Scalar_Tensor aten.bitwise_xor.Tensor
aten.blackman_window.default aten.blackman_window.periodic aten.block_diag.default aten.bmm.default aten.bmm.dtype
aten.broadcast_tensors.default aten.broadcast_to.default aten.bucketize.Scalar aten.bucketize.Tensor
aten.cartesian_prod.default aten.cat.default aten.cdist.default aten.ceil.default aten.ceil_.default aten.chalf.default
aten.channel_shuffle.default aten.chunk.default aten.clamp.Tensor aten.clamp.default aten.clamp_.Tensor
aten.clamp_.default aten.clamp_max.Tensor aten.clamp_max.default aten.clamp_max_.default aten.clamp_min.Tensor
aten.clamp_min.default aten.clamp_min_.default aten.clip.Tensor aten.clip.default aten.clone.default
aten.col2im.default aten.combinations.default aten.complex.default aten.concat.default aten.concatenate.default
aten.conj.default aten.conj_physical.default aten.constant_pad_nd.default aten.contiguous.default aten.conv1d.default
aten.conv1d.padding aten.conv2d.default aten.conv2d.padding aten.conv3d.default aten.conv3d.padding
aten.conv_depthwise3d.default aten.conv_transpose1d.default aten.conv_transpose2d.input aten.conv_transpose3d.input
aten.copy.default aten.copy_.default aten.cos.default aten.cos_.default aten.cosh.default
aten.cosine_embedding_loss.default aten.cosine_similarity.default aten.count_nonzero.default
aten.count_nonzero.dim_IntList aten.cross.default aten.cross_entropy_loss.default aten.ctc_loss.IntList
aten.ctc_loss.Tensor aten.cummax.default aten.cummin.default aten.cumprod.default aten.cumsum.default
aten.deg2rad.default aten.detach.default aten.detach_.default aten.diag.default aten.diag_embed.default
aten.diagflat.default aten.diagonal.default aten.diagonal_scatter.default aten.diff.default aten.digamma.default
aten.dist.default aten.div.Scalar aten.div.Scalar_mode aten.div.Tensor aten.div.Tensor_mode aten.div_.Scalar
aten.div_.Tensor aten.div_.Tensor_mode aten.divide.Scalar aten.divide.Scalar_mode aten.divide.Tensor
aten.divide.Tensor_mode aten.dot.default aten.dropout.default aten.dropout_.default aten.dsplit.array aten.dsplit.int
aten.dstack.default aten.einsum.default aten.einsum.sublist aten.elu_.default aten.embedding.default
aten.embedding_bag.default aten.embedding_bag.padding_idx aten.empty.memory_format aten.empty_like.default
aten.eq.Scalar aten.eq.Tensor aten.eq_.Scalar aten.erf.default aten.erfc.default aten.erfinv.default aten.exp.default
aten.exp2.default aten.exp_.default aten.expand.default aten.expand_as.default aten.expm1.default aten.eye.default
aten.eye.m aten.feature_alpha_dropout.default aten.feature_dropout.default aten.fft_fft.default aten.fft_fft2.default
aten.fft_fftfreq.default aten.fft_fftn.default aten.fft_fftshift.default aten.fft_ifft.default aten.fft_ifft2.default
aten.fft_ifftn.default aten.fft_ifftshift.default aten.fft_irfft.default aten.fft_irfft2.default
aten.fft_irfftn.default aten.fft_rfft.default aten.fft_rfft2.default aten.fft_rfftfreq.default aten.fft_rfftn.default
aten.fill_.Scalar aten.fill_.Tensor aten.fix.default aten.flatten.using_ints aten.flip.default aten.fliplr.default
aten.flipud.default aten.float_power.Scalar aten.float_power.Tensor_Scalar aten.float_power.Tensor_Tensor
aten.floor.default aten.floor_.default aten.floor_divide.Scalar aten.floor_divide.default aten.floor_divide_.Scalar
aten.floor_divide_.Tensor aten.fmax.default aten.fmin.default aten.fmod.Scalar aten.fmod.Tensor aten.frac.default
aten.fractional_max_pool2d.default aten.fractional_max_pool3d.default aten.frexp.Tensor aten.frobenius_norm.dim
aten.full.default aten.full_like.default aten.gather.default aten.gcd.default aten.ge.Scalar aten.ge.Tensor
aten.ge_.Scalar aten.gelu.default aten.gelu_.default aten.ger.default aten.glu.default aten.greater.Scalar
aten.greater.Tensor aten.greater_equal.Scalar aten.greater_equal.Tensor aten.grid_sampler.default
aten.grid_sampler_2d.default aten.grid_sampler_3d.default aten.group_norm.default aten.gru.input aten.gt.Scalar
aten.gt.Tensor aten.gt_.Scalar aten.hamming_window.default aten.hamming_window.periodic
aten.hamming_window.periodic_alpha aten.hamming_window.periodic_alpha_beta aten.hann_window.default
aten.hann_window.periodic aten.hardshrink.default aten.hardsigmoid.default aten.hardsigmoid_.default
aten.hardswish.default aten.hardswish_.default aten.hardtanh.default aten.hardtanh_.default aten.heaviside.default
aten.hinge_embedding_loss.default aten.histc.default aten.histogram.bin_ct aten.histogram.bins_tensor aten.hsplit.array
aten.hsplit.int aten.hstack.default aten.huber_loss.default aten.hypot.default aten.i0.default aten.igamma.default
aten.igammac.default aten.im2col.default aten.imag.default aten.index.Tensor aten.index_add.default
aten.index_add_.default aten.index_copy.default aten.index_copy_.default aten.index_fill.int_Scalar
aten.index_fill.int_Tensor aten.index_fill_.int_Scalar aten.index_put.default aten.index_put_.default
aten.index_reduce.default aten.index_select.default aten.inner.default aten.instance_norm.default
aten.is_nonzero.default aten.isclose.default aten.isfinite.default aten.isin.Scalar_Tensor aten.isin.Tensor_Scalar
aten.isin.Tensor_Tensor aten.isinf.default aten.isnan.default aten.isneginf.default aten.isposinf.default
aten.isreal.default aten.istft.default aten.item.default aten.kaiser_window.beta aten.kaiser_window.default
aten.kaiser_window.periodic aten.kl_div.default aten.kron.default aten.l1_loss.default aten.layer_norm.default
aten.lcm.default aten.ldexp.Tensor aten.le.Scalar aten.le.Tensor aten.le_.Scalar aten.leaky_relu.default
aten.leaky_relu_.default aten.lerp.Scalar aten.lerp.Tensor aten.lerp_.Scalar aten.lerp_.Tensor aten.less.Scalar
aten.less.Tensor aten.less_equal.Scalar aten.less_equal.Tensor aten.lgamma.default aten.lift_fresh.default
aten.lift_fresh_copy.default aten.linalg_cross.default aten.linalg_diagonal.default aten.linalg_inv.default
aten.linalg_matmul.default aten.linalg_matrix_norm.default aten.linalg_matrix_power.default
aten.linalg_multi_dot.default aten.linalg_norm.default aten.linalg_qr.default aten.linalg_solve.default
aten.linalg_solve_triangular.default aten.linalg_svd.default aten.linalg_vecdot.default aten.linalg_vector_norm.default
aten.linear.default aten.linspace.Scalar_Tensor aten.linspace.Tensor_Scalar aten.linspace.Tensor_Tensor
aten.linspace.default aten.log.default aten.log10.default aten.log1p.default aten.log2.default aten.log_.default
aten.log_sigmoid.default aten.log_sigmoid_forward.default aten.log_softmax.int aten.logaddexp.default
aten.logaddexp2.default aten.logcumsumexp.default aten.logical_and.default aten.logical_and_.default
aten.logical_not.default aten.logical_not_.default aten.logical_or.default aten.logical_or_.default
aten.logical_xor.default aten.logit.default aten.logspace.Scalar_Tensor aten.logspace.Tensor_Scalar
aten.logspace.Tensor_Tensor aten.logspace.default aten.logsumexp.default aten.lstm.input aten.lt.Scalar aten.lt.Tensor
aten.lt_.Scalar aten.mH.default aten.mT.default aten.margin_ranking_loss.default aten.masked_fill.Scalar
aten.masked_fill.Tensor aten.masked_fill_.Scalar aten.masked_fill_.Tensor aten.masked_scatter.default
aten.masked_scatter_.default aten.masked_select.default aten.matmul.default aten.matrix_H.default
aten.matrix_exp.default aten.matrix_power.default aten.max.default aten.max.dim aten.max.other aten.max_pool1d.default
aten.max_pool2d.default aten.max_pool3d.default aten.maximum.default aten.mean.default aten.mean.dim
aten.median.default aten.median.dim aten.meshgrid.default aten.meshgrid.indexing aten.min.default aten.min.dim
aten.min.other aten.minimum.default aten.mish.default aten.mish_.default aten.mm.default aten.mm.dtype
aten.moveaxis.int aten.moveaxis.intlist aten.movedim.int aten.movedim.intlist aten.mse_loss.default aten.msort.default
aten.mul.Scalar aten.mul.Tensor aten.mul_.Scalar aten.mul_.Tensor aten.multi_margin_loss.default
aten.multilabel_margin_loss.default aten.multilabel_margin_loss_forward.default aten.multinomial.default
aten.multiply.Scalar aten.multiply.Tensor aten.mv.default aten.mvlgamma.default aten.nan_to_num.default
aten.nanmean.default aten.nanmedian.default aten.nanmedian.dim aten.nansum.default aten.narrow.Tensor
aten.narrow.default aten.native_channel_shuffle.default aten.native_dropout.default aten.native_group_norm.default
aten.native_layer_norm.default aten.ne.Scalar aten.ne.Tensor aten.ne_.Scalar aten.neg.default aten.neg_.default
aten.negative.default aten.new_empty.default aten.new_full.default aten.new_ones.default aten.new_zeros.default
aten.nextafter.default aten.nll_loss.default aten.nll_loss2d.default aten.nll_loss2d_forward.default
aten.nll_loss_forward.default aten.nll_loss_nd.default aten.nonzero.default aten.nonzero_numpy.default aten.norm.Scalar
aten.norm.ScalarOpt_dim aten.norm.ScalarOpt_dim_dtype aten.norm.ScalarOpt_dtype aten.norm_except_dim.default
aten.normal_.default aten.not_equal.Scalar aten.not_equal.Tensor aten.nuclear_norm.default aten.nuclear_norm.dim
aten.numpy_T.default aten.one_hot.default aten.ones.default aten.ones_like.default aten.outer.default aten.pad.default
aten.pad_sequence.default aten.pairwise_distance.default aten.permute.default aten.pixel_shuffle.default
aten.pixel_unshuffle.default aten.polar.default aten.polygamma.default aten.positive.default aten.pow.Scalar
aten.pow.Tensor_Scalar aten.pow.Tensor_Tensor aten.pow_.Scalar aten.pow_.Tensor aten.prod.default aten.prod.dim_int
aten.put.default aten.quantile.default aten.quantile.scalar aten.rad2deg.default aten.rand.default
aten.rand_like.default aten.randint.default aten.randint.low aten.randint_like.default aten.randint_like.low_dtype
aten.randn.default aten.randn_like.default aten.randperm.default aten.range.default aten.range.step aten.ravel.default
aten.real.default aten.reciprocal.default aten.reciprocal_.default aten.reflection_pad1d.default
aten.reflection_pad2d.default aten.reflection_pad3d.default aten.relu.default aten.relu6_.default aten.relu_.default
aten.remainder.Scalar aten.remainder.Scalar_Tensor aten.remainder.Tensor aten.remainder_.Scalar aten.remainder_.Tensor
aten.renorm.default aten.repeat.default aten.repeat_interleave.Tensor aten.repeat_interleave.self_Tensor
aten.repeat_interleave.self_int aten.replication_pad1d.default aten.replication_pad2d.default
aten.replication_pad3d.default aten.reshape.default aten.reshape_as.default aten.resolve_conj.default
aten.resolve_neg.default aten.rms_norm.default aten.rnn_relu.input aten.rnn_tanh.input aten.roll.default
aten.rot90.default aten.round.decimals aten.round.default aten.round_.default aten.row_stack.default aten.rsqrt.default
aten.rsqrt_.default aten.rsub.Scalar aten.rsub.Tensor aten.scalar_tensor.default
aten.scaled_dot_product_attention.default aten.scatter.reduce aten.scatter.src aten.scatter.value
aten.scatter.value_reduce aten.scatter_.src aten.scatter_.value aten.scatter_add.default aten.scatter_add_.default
aten.scatter_reduce.two aten.scatter_reduce_.two aten.searchsorted.Scalar aten.searchsorted.Tensor aten.select.int
aten.select_scatter.default aten.sgn.default aten.sigmoid.default aten.sigmoid_.default aten.sign.default
aten.signbit.default aten.silu.default aten.silu_.default aten.sin.default aten.sin_.default aten.sinc.default
aten.sinh.default aten.slice.Tensor aten.slice_scatter.default aten.smooth_l1_loss.default
aten.soft_margin_loss.default aten.softmax.int aten.softplus.default aten.softshrink.default aten.sort.default
aten.sort.stable aten.split.Tensor aten.split.default aten.split.sizes aten.split_with_sizes.default aten.sqrt.default
aten.sqrt_.default aten.square.default aten.square_.default aten.squeeze.default aten.squeeze.dim aten.squeeze.dims
aten.stack.default aten.std.correction aten.std.default aten.std.dim aten.std_mean.correction aten.std_mean.default
aten.std_mean.dim aten.stft.center aten.stft.default aten.sub.Scalar aten.sub.Tensor aten.sub_.Scalar aten.sub_.Tensor
aten.subtract.Scalar aten.subtract.Tensor aten.sum.default aten.sum.dim_IntList aten.swapaxes.default
aten.swapdims.default aten.sym_constrain_range.default aten.sym_constrain_range_for_size.default aten.sym_numel.default
aten.sym_size.int aten.t.default aten.take.default aten.take_along_dim.default aten.tan.default aten.tanh.default
aten.tanh_.default aten.tensor_split.indices aten.tensor_split.sections aten.tensor_split.tensor_indices_or_sections
aten.tensordot.default aten.threshold.default aten.tile.default aten.to.device aten.to.dtype aten.to.dtype_layout
aten.to.other aten.topk.default aten.trace.default aten.transpose.int aten.triangular_solve.default aten.tril.default
aten.tril_.default aten.triplet_margin_loss.default aten.triu.default aten.triu_.default aten.true_divide.Scalar
aten.true_divide.Tensor aten.trunc.default aten.type_as.default aten.unbind.int aten.unflatten.int aten.unfold.default
aten.uniform.default aten.uniform_.default aten.unique_consecutive.default aten.unique_dim.default
aten.unique_dim_consecutive.default aten.unsqueeze.default aten.upsample_bicubic2d.default aten.upsample_bicubic2d.vec
aten.upsample_bilinear2d.default aten.upsample_bilinear2d.vec aten.upsample_linear1d.default aten.upsample_linear1d.vec
aten.upsample_nearest1d.default aten.upsample_nearest1d.vec aten.upsample_nearest2d.default aten.upsample_nearest2d.vec
aten.upsample_nearest3d.default aten.upsample_nearest3d.vec aten.upsample_trilinear3d.default
aten.upsample_trilinear3d.vec aten.vander.default aten.var.correction aten.var.default aten.var.dim
aten.var_mean.correction aten.var_mean.default aten.var_mean.dim aten.vdot.default aten.view.default aten.view.dtype
aten.view_as.default aten.view_as_complex.default aten.view_as_real.default aten.vsplit.array aten.vsplit.int
aten.vstack.default aten.where.Scalar aten.where.ScalarOther aten.where.ScalarSelf aten.where.default aten.where.self
aten.xlogy.Scalar_Other aten.xlogy.Scalar_Self aten.xlogy.Tensor aten.zero_.default aten.zeros.default
aten.zeros_like.default graftc.circulant_product.default graftc.gated_gradients.default graftc.gated_weight.default
graftc.grad_mask.default graftc.inverse_beside_one.default graftc.masked_dropout.default
graftc.masked_gradient.default graftc.pruned_weight.default graftc.random_mask.default graftc.rescale.default
graftc.row_norm.default graftc.row_norm_backward.default graftc.sampled_product.default graftc.seeded_dropout.default
graftc.skew.default graftc.sparse_linear.default graftc.sparse_weight.default
transformers.grouped_mm_fallback.default transformers.grouped_mm_fallback_backward.default
"""

OPERATORS = frozenset(_NAMES.split())
"""The names as a set."""
