output "vpc_id" {
  description = "The network."
  value       = aws_vpc.this.id
}

output "private_subnets" {
  description = "Letter of a zone to its private subnet, which has a way out once this is known."
  value       = { for letter, subnet in aws_subnet.private : letter => subnet.id }
  depends_on  = [aws_route.nat, aws_route_table_association.private]
}

output "zones" {
  description = "Letter of a zone to the zone's name, as the subnets have it."
  value       = { for letter, subnet in aws_subnet.private : letter => subnet.availability_zone }
}

output "public_subnets" {
  description = "Letter of a zone to its public subnet."
  value       = { for letter, subnet in aws_subnet.public : letter => subnet.id }
  depends_on  = [aws_route.out, aws_route_table_association.public]
}
