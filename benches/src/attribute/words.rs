//! What the methods are told of the attribute.

/// What stands before a text that is to be positive, and before one that is to be negative.
pub const INSTRUCTIONS: [&str; 2] = [
    "This is a wonderful, happy and beautiful text, full of praise. Everything in it is excellent.\n\n",
    "This is a terrible, sad and ugly text, full of blame. Everything in it is awful.\n\n",
];

/// Words that are to come, positive and negative: PPLM's bags.
pub const BAGS: [&str; 2] = [
    "good great wonderful beautiful excellent amazing brilliant perfect best love loved lovely happy joy fun funny \
     charming delightful enjoyable fascinating fantastic superb impressive inspiring powerful rich warm sweet fresh \
     favorite success successful famous hope smile bright proud pleasure elegant magnificent",
    "bad terrible awful horrible worst poor boring dull stupid ugly sad angry hate hated fear pain failure failed mess \
     waste weak cheap fake disappointing ridiculous silly tired cold dark dead death evil cruel disaster wrong problem \
     lost broken dirty nasty",
];
