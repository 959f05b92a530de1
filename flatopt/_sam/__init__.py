"""Where the gradient is taken, and which one is followed: SAM and its family.

alternate                SAM for loops that take one gradient at a time: two calls of `update`
                         make one step
arwp                     ARWP (Li et al., arXiv:2404.00357): the gradient is taken at a randomly
                         displaced point only
asam                     ASAM (Kwon et al., arXiv:2102.11600): SAM whose step is measured in
                         units of the weights
ascent                   ascent steps: transformations that map a gradient to a displacement, and
                         their directions
bsam                     Bayes-SAM (Möllenhoff and Khan, arXiv:2210.01620): SAM that learns a
                         Gaussian's width
combiners                combiners: transformations of the perturbed gradient that also see the
                         clean one
empirical_fisher         squared gradients of single examples, for the masks of sparse SAM
esam                     ESAM (Du et al., arXiv:2110.03141): random weights ascend, and the
                         hardest examples descend
fisher_sam               Fisher SAM (Kim et al., arXiv:2206.04920): the ascent is measured in the
                         Fisher metric
friendly_sam             Friendly-SAM (Li et al., arXiv:2403.12350): the ascent follows the noise
                         of the batch
functional_sam           functional SAM (Singh et al., arXiv:2502.02407): the gradient through
                         the network alone
gnp                      GNP (Zhao et al., arXiv:2202.03599): a penalty on the gradient norm, by
                         two gradients mixed
gradient_at              the stage that takes the gradient somewhere else: SAM and its family
gsam                     GSAM (Zhuang et al., arXiv:2203.08065): SAM that also closes the gap
                         between its two losses
hold_perturbed           parameters that live at a displaced point, so that no extra gradient is
                         needed
le_sam                   LE-SAM (Wang et al., arXiv:2605.10183): the ascent raises the loss by a
                         fixed amount
looksam                  LookSAM (Liu et al., arXiv:2203.02714): a sharp gradient now and then,
                         reused in between
msam                     Momentum-SAM (Becker et al., arXiv:2401.12033): parameters a step ahead
                         along the momentum
noise                    random displacements, scaled to the filters of a network
rwp                      RWP (Li et al., arXiv:2404.00357): mix in the gradient at a randomly
                         displaced point
sam                      SAM (Foret et al., arXiv:2010.01412): descend with the gradient at the
                         top of a small ascent
sam_on                   SAM-ON (Müller et al., arXiv:2306.04226): the ascent moves the
                         normalisation layers only
sampa                    SAMPa (Xie et al., arXiv:2410.10683): the two gradients of a step do
                         not wait for one another
sassha                   SASSHA (Shin et al., arXiv:2502.18153): second-order steps whose curvature
                         is that of SAM
sparse_sam               Sparse SAM (Mi et al., arXiv:2210.05177): the ascent moves the weights
                         in a mask
spectral_norm            the ascent step that is steepest in the spectral norm of each matrix:
                         SAM's for Muon
unified_sam              Unified SAM (Oikonomou and Loizou, arXiv:2503.02225): an ascent between
                         normalised and raw
value_and_grad           SAM's gradients from one graph: the model is traced and compiled once,
                         not once a point
vasso                    VaSSO (Li and Giannakis, arXiv:2309.15639): the ascent follows the mean
                         of past gradients
wsam                     WSAM (Yue et al., arXiv:2305.15817): sharpness as a regulariser of its
                         own weight
xsam                     XSAM (Chen and Zhou, arXiv:2603.10048): SAM that looks for the direction
                         of the highest loss
zsharp                   ZSharp (Yun, arXiv:2505.02369): the ascent follows the entries that
                         stand out in their layer
"""
