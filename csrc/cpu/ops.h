// The CPU operators. Arguments are described in infopro_fast/ops/<op>.py, where the schemas are.
#pragma once

#include "../checks.h"

namespace infopro {

std::tuple<Tensor, Tensor> reconstruction_loss_forward_cpu(
    Tensor features, Tensor image, Tensor w1, OptionalTensor b1, OptionalTensor gamma, OptionalTensor beta, Tensor w2, OptionalTensor b2,
    OptionalTensor running_mean, OptionalTensor running_var, std::vector<double> restore, double eps, int64_t mode, int64_t loss,
    bool needs_grad);

std::tuple<Tensor, Tensor, Tensor> reconstruction_loss_backward_cpu(
    Tensor grad, Tensor features, Tensor image, Tensor w1, OptionalTensor b1, OptionalTensor gamma, OptionalTensor beta, Tensor w2,
    OptionalTensor b2, Tensor saved, std::vector<double> restore, bool batch_statistics, double eps, int64_t mode, int64_t loss,
    bool needs_features, bool needs_w1);

std::tuple<Tensor, Tensor> supcon_loss_forward_cpu(Tensor features, Tensor labels, double temperature, bool normalize);

Tensor supcon_loss_backward_cpu(Tensor grad, Tensor features, Tensor labels, Tensor saved, double temperature, bool normalize);

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_forward_cpu(Tensor input, Tensor weight, Tensor target, OptionalTensor bias,
                                                                    OptionalTensor class_weight, int64_t ignore_index, double label_smoothing,
                                                                    int64_t reduction);

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(Tensor grad, Tensor input, Tensor weight, Tensor target,
                                                                     OptionalTensor bias, OptionalTensor class_weight, Tensor lse,
                                                                     int64_t ignore_index, double label_smoothing, int64_t reduction,
                                                                     bool needs_input, bool needs_weight);

std::tuple<Tensor, Tensor> norm_relu_pool_forward_cpu(Tensor x, OptionalTensor gamma, OptionalTensor beta, OptionalTensor running_mean,
                                                      OptionalTensor running_var, double eps);

std::tuple<Tensor, Tensor, Tensor> norm_relu_pool_backward_cpu(Tensor grad, Tensor x, OptionalTensor gamma, OptionalTensor beta, Tensor saved,
                                                               bool batch_statistics, double eps);

std::tuple<Tensor, Tensor, Tensor> conv_norm_relu_pool_forward_cpu(Tensor x, Tensor weight, int64_t stride, OptionalTensor gamma,
                                                                   OptionalTensor beta, OptionalTensor running_mean,
                                                                   OptionalTensor running_var, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_norm_relu_pool_backward_cpu(Tensor grad, Tensor x, Tensor weight, int64_t stride, Tensor z,
                                                                            OptionalTensor gamma, OptionalTensor beta, Tensor saved,
                                                                            bool batch_statistics, double eps, bool needs_x,
                                                                            bool needs_weight);

std::tuple<Tensor, Tensor> chain_stage_forward_cpu(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma, OptionalTensor beta,
                                                   double eps, Tensor weight, OptionalTensor bias, int64_t H, int64_t W, int64_t mode,
                                                   std::vector<double> factors, bool in_f64);

std::tuple<Tensor, Tensor, Tensor> chain_stage_backward_cpu(Tensor dy, Tensor z, Tensor z_mean, Tensor z_var, OptionalTensor z_gamma, double z_eps,
                                                            OptionalTensor mean_dy, Tensor x, OptionalTensor mean, OptionalTensor var,
                                                            OptionalTensor gamma, OptionalTensor beta, double eps, Tensor weight, int64_t mode,
                                                            std::vector<double> factors, bool needs_x, bool needs_weight);

Tensor chain_loss_forward_cpu(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma, OptionalTensor beta, double eps,
                              Tensor weight, OptionalTensor bias, Tensor image, std::vector<double> restore, int64_t mode,
                              std::vector<double> factors, int64_t loss, bool in_f64);

std::tuple<Tensor, Tensor, Tensor, Tensor> chain_loss_backward_cpu(Tensor grad, Tensor x, OptionalTensor mean, OptionalTensor var,
                                                                   OptionalTensor gamma, OptionalTensor beta, double eps, Tensor weight,
                                                                   OptionalTensor bias, Tensor image, std::vector<double> restore, int64_t mode,
                                                                   std::vector<double> factors, int64_t loss, bool needs_x, bool needs_weight);

Tensor upsample_conv3x3_forward_cpu(Tensor x, Tensor weight, OptionalTensor bias, int64_t H, int64_t W, int64_t mode);

std::tuple<Tensor, Tensor> upsample_conv3x3_backward_cpu(Tensor grad, Tensor x, Tensor weight, int64_t mode, bool needs_x, bool needs_weight);

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_forward_cpu(Tensor logits, Tensor target, OptionalTensor class_weight,
                                                                              bool align_corners, int64_t ignore_index,
                                                                              double label_smoothing, int64_t reduction, int64_t keep,
                                                                              bool needs_confusion);

Tensor upsample_cross_entropy_backward_cpu(Tensor grad, Tensor logits, Tensor target, OptionalTensor class_weight, Tensor kept, Tensor divisor,
                                           bool align_corners, int64_t ignore_index, double label_smoothing, int64_t reduction, int64_t keep);

}  // namespace infopro
