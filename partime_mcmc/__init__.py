"""partime_mcmc: Markov chain Monte Carlo and recurrent networks, parallel over time."""
