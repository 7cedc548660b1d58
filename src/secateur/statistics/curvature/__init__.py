"""Second-order statistics: Hessian, Gauss-Newton, Fisher, Kronecker factors, their damped inverses."""
