//! From sums to weights: λ by what was held out, then all rows.

use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use protocol::experiment::projector::{Method, RidgeRecipe, TrainSpec};
use protocol::results::{LayerFit, RidgeResult};

use super::moments::{Cross, Moments};
use super::statistics::{LayerSums, Statistics, training_hash};
use super::{LayerMatrix, Ridge};
use crate::projector::error::ProjectorError;
use crate::projector::file::Manifest;
use crate::projector::{Projector, RIDGE, each_layer};

/// What sums solve to.
#[derive(Debug)]
pub struct Solved {
    /// The projector.
    pub projector: Projector,
    /// The control: the same of pairs that do not belong together, with the same λ.
    pub shuffled: Projector,
    /// How well it predicts what was held out.
    pub result: RidgeResult,
}

/// One layer's.
struct LayerSolved {
    matrix: LayerMatrix,
    shuffled: LayerMatrix,
    /// λ and R² of keys, and of values.
    chosen: [Choice; 2],
}

/// The λ with the least error on what was held out.
#[derive(Clone, Copy)]
struct Choice {
    lambda: f64,
    r2: f64,
}

/// Solves for the projector of `spec` from all its sums.
///
/// # Errors
/// [`ProjectorError::Ridge`] for no λ, a λ that is not above 0, nothing held out or nothing to fit; [`ProjectorError::Parts`] for
/// sums of another training.
pub fn solve(sums: &Statistics, spec: &TrainSpec) -> Result<Solved, ProjectorError> {
    let wrong = |what: &str| Err(ProjectorError::Ridge { what: what.to_owned() });
    let Method::Ridge(recipe) = &spec.method else { return wrong("the spec is of another method") };
    if sums.manifest.training != training_hash(spec) {
        return Err(ProjectorError::Parts { what: "they are of another training than the spec's".to_owned() });
    }
    if recipe.lambdas.is_empty() || !recipe.lambdas.iter().all(|lambda| lambda.is_finite() && *lambda > 0.0) {
        return wrong("it takes at least one lambda, each above 0");
    }
    if sums.rows_held_out() == 0 || sums.rows() == sums.rows_held_out() {
        return wrong("samples of at least two groups are needed, one of them held out: take more names or documents");
    }
    let solved = each_layer(sums.layers.len(), |index| solve_layer(&sums.layers[index], recipe));
    let solved: Vec<LayerSolved> = solved.into_iter().collect::<Result<_, _>>()?;
    let fits = solved.iter().zip(&sums.manifest.layers).enumerate().map(|(layer, (solved, sources))| {
        let number = |value: usize| u32::try_from(value).expect("layers fit 32 bits");
        let [key, value] = solved.chosen;
        LayerFit {
            layer: number(layer),
            sources: sources.iter().map(|source| number(*source)).collect(),
            lambda_key: key.lambda,
            lambda_value: value.lambda,
            r2_key: key.r2,
            r2_value: value.r2,
        }
    });
    let layers = fits.collect();
    let (right, control): (Vec<_>, Vec<_>) = solved.into_iter().map(|layer| (layer.matrix, layer.shuffled)).unzip();
    let projector = Projector::ridge(manifest(sums, recipe, "matched"), Ridge { layers: right })?;
    let shuffled = Projector::ridge(manifest(sums, recipe, "shuffled"), Ridge { layers: control })?;
    let result = RidgeResult {
        source: sums.manifest.source.fingerprint.clone(),
        target: sums.manifest.target.fingerprint.clone(),
        rows: sums.rows(),
        parameters: projector.parameters(),
        layers,
    };
    Ok(Solved { projector, shuffled, result })
}

fn manifest(sums: &Statistics, recipe: &RidgeRecipe, pairs: &str) -> Manifest {
    let of = &sums.manifest;
    Manifest {
        method: RIDGE.to_owned(),
        source: of.source.clone(),
        target: of.target.clone(),
        layers: of.layers.clone(),
        corpus: of.corpus.clone(),
        recipe: serde_json::json!({ "ridge": recipe, "pairs": pairs }),
        samples: sums.samples(),
    }
}

fn solve_layer(sums: &LayerSums, recipe: &RidgeRecipe) -> Result<LayerSolved, ProjectorError> {
    let fit = Standardised::new(&sums.fit)?;
    let held = &sums.held;
    let mirrored = mirrored(&held.xx);
    let mut chosen = [Choice { lambda: recipe.lambdas[0], r2: f64::NEG_INFINITY }; 2];
    for lambda in &recipe.lambdas {
        let weights = fit.raw(&fit.solve(*lambda, &fit.standard(&sums.fit.cross))?);
        let r2 = r2(&weights, &sums.fit.cross, held, &mirrored);
        for (choice, r2) in chosen.iter_mut().zip(r2) {
            if r2 > choice.r2 {
                *choice = Choice { lambda: *lambda, r2 };
            }
        }
    }
    let mut all = sums.fit.clone();
    all.merge(held);
    let standard = Standardised::new(&all)?;
    let matrix = standard.matrix(&all.cross, &chosen)?;
    let shuffled = standard.matrix(&sums.shuffled, &chosen)?;
    Ok(LayerSolved { matrix, shuffled, chosen })
}

/// C, and how to get from x to z.
struct Standardised {
    correlation: Mat<f64>,
    /// 1 / sd of each feature; 0 for one that never changes.
    scale: Vec<f64>,
    rows: f64,
}

impl Standardised {
    fn new(moments: &Moments) -> Result<Self, ProjectorError> {
        let (xx, rows) = (&moments.xx, moments.cross.rows as f64);
        let scale: Vec<f64> = (0..xx.nrows())
            .map(|feature| match (xx[(feature, feature)] / rows).sqrt() {
                sd if sd > 0.0 => 1.0 / sd,
                _ => 0.0,
            })
            .collect();
        if !scale.iter().all(|scale| scale.is_finite()) {
            return Err(ProjectorError::Ridge { what: "a feature's variance is not a number".to_owned() });
        }
        let correlation =
            Mat::from_fn(
                xx.nrows(),
                xx.nrows(),
                |i, j| if i < j { 0.0 } else { xx[(i, j)] * scale[i] * scale[j] / rows },
            );
        Ok(Self { correlation, scale, rows })
    }

    /// B of these products.
    fn standard(&self, cross: &Cross) -> Mat<f64> {
        Mat::from_fn(cross.xy.nrows(), cross.xy.ncols(), |i, j| cross.xy[(i, j)] * self.scale[i] / self.rows)
    }

    /// (C + λ I)⁻¹ B.
    fn solve(&self, lambda: f64, b: &Mat<f64>) -> Result<Mat<f64>, ProjectorError> {
        let mut regular = self.correlation.clone();
        for feature in 0..regular.nrows() {
            regular[(feature, feature)] += lambda;
        }
        let factor = regular.llt(Side::Lower).map_err(|_| ProjectorError::Ridge {
            what: format!("with lambda {lambda} the features' correlations are not positive definite"),
        })?;
        Ok(factor.solve(b))
    }

    /// Weights of x rather than z.
    fn raw(&self, weights: &Mat<f64>) -> Mat<f64> {
        Mat::from_fn(weights.nrows(), weights.ncols(), |i, j| weights[(i, j)] * self.scale[i])
    }

    /// Keys with their λ, values with theirs.
    fn matrix(&self, cross: &Cross, chosen: &[Choice; 2]) -> Result<LayerMatrix, ProjectorError> {
        let b = self.standard(cross);
        let half = b.ncols() / 2;
        let mut weights = Mat::zeros(b.nrows(), b.ncols());
        for (place, choice) in chosen.iter().enumerate() {
            let part = self.solve(choice.lambda, &b.subcols(place * half, half).to_owned())?;
            weights.subcols_mut(place * half, half).copy_from(self.raw(&part));
        }
        let offset = |column: usize| {
            let moved: f64 = weights.col(column).iter().zip(&cross.mean_x).map(|(weight, mean)| weight * mean).sum();
            cross.mean_y[column] - moved
        };
        #[expect(clippy::cast_possible_truncation, reason = "sums are f64, projectors f32")]
        Ok(LayerMatrix {
            bias: (0..weights.ncols()).map(|column| offset(column) as f32).collect(),
            weight: (0..weights.nrows())
                .flat_map(|row| (0..weights.ncols()).map(move |column| (row, column)))
                .map(|place| weights[place] as f32)
                .collect(),
        })
    }
}

/// R² of keys and of values on what was held out, for weights that were fitted without it: 1 - Σ |y - ŷ|² / Σ |y - mean y|².
fn r2(weights: &Mat<f64>, fit: &Cross, held: &Moments, mirrored: &Mat<f64>) -> [f64; 2] {
    let rows = held.cross.rows as f64;
    let away: Vec<f64> = held.cross.mean_x.iter().zip(&fit.mean_x).map(|(held, fit)| held - fit).collect();
    let spread = mirrored * weights;
    let half = weights.ncols() / 2;
    [0..half, half..2 * half].map(|columns| {
        let (mut residual, mut total) = (0.0, 0.0);
        for column in columns {
            let w = weights.col(column);
            let along = |with: faer::ColRef<'_, f64>| w.iter().zip(with.iter()).map(|(a, b)| a * b).sum::<f64>();
            let moved: f64 = w.iter().zip(&away).map(|(weight, away)| weight * away).sum();
            let missed = held.cross.mean_y[column] - fit.mean_y[column] - moved;
            residual += held.cross.yy[column] - 2.0 * along(held.cross.xy.col(column))
                + along(spread.col(column))
                + rows * missed * missed;
            total += held.cross.yy[column];
        }
        if total > 0.0 { 1.0 - residual / total } else { 0.0 }
    })
}

/// The whole of a matrix of which the lower triangle is held.
fn mirrored(lower: &Mat<f64>) -> Mat<f64> {
    Mat::from_fn(lower.nrows(), lower.ncols(), |i, j| lower[(i.max(j), i.min(j))])
}
